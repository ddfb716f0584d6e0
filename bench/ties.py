"""Why two planners of one algorithm place a layer differently."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton import Topology

CAUSES = {
    "equal loads": "two experts of the layer have equal load: the sort or the maximum takes one or the other",
    "equal replica loads": "no two experts do, but two replicas of different experts have equal load / count",
    "equal groups": "neither, but two expert groups of the layer have equal load",
    "rounding": "nothing is equal: loads of packs or groups are summed in another type or order and compare otherwise",
}
"""In the order in which they are looked for; a layer has the first that holds."""


def causes(loads: Tensor, logcnt: Tensor, topology: Topology) -> list[str]:
    """The cause for each layer of loads [L, E] float32 planned with counts logcnt [L, E]."""
    if not len(loads):
        return []
    by_group = loads.double().view(len(loads), topology.planned_groups, -1).sum(2).float()
    share = loads / logcnt
    found = []
    for tied in torch.stack([_any_equal(loads), _any_equal(share), _any_equal(by_group)], dim=1).tolist():
        found.append(next((name for name, holds in zip(CAUSES, tied, strict=False) if holds), "rounding"))
    return found


def _any_equal(values: Tensor) -> Tensor:
    """Whether two of each row are equal."""
    ascending = values.sort(dim=1).values
    return (ascending[:, 1:] == ascending[:, :-1]).any(1)
