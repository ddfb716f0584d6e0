"""What the plans of a series are worth: balance, what moves, and whether two planners planned the same, and why not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.testing import canonical

CAUSES = {
    "equal loads": "two experts of the layer have equal load: the sort or the maximum takes one or the other",
    "equal replica loads": "no two experts do, but two replicas of different experts have equal load / count",
    "equal groups": "neither, but two expert groups of the layer have equal load",
    "rounding": "nothing is equal: loads of packs or groups are summed in another type or order and compare otherwise",
}
"""In the order in which they are looked for; a layer has the first that holds."""


class Quality(TypedDict):
    """Lists have one entry a window, or one a pair of consecutive windows."""

    balancedness: list[float]  # of the plan of each window, on that window
    gap: list[float]  # 1 / balancedness - 1: how far the heaviest GPUs are above the mean
    next_balancedness: list[float]  # of the plan of each window, on the next one
    moved_slots: list[float]  # slots whose expert changed from a plan to the next, share of all
    fetched: list[float]  # experts that a GPU did not hold before, from a plan to the next, share of all slots
    duplicates: list[float]  # replicas that share a GPU with another of their expert, share of all


def quality(placements: Sequence[Placement], series: Tensor) -> Quality:
    """Judge the plans of windows 0, 1, ... of `series` [T, L, E], T larger than the number of plans."""
    balancedness = [plan.balancedness(loads) for plan, loads in zip(placements, series, strict=False)]
    moves = [new.moved(old) for old, new in itertools.pairwise(placements)]
    slots = placements[0].phy2log.numel()
    return Quality(
        balancedness=balancedness,
        gap=[1 / value - 1 for value in balancedness],
        next_balancedness=[plan.balancedness(loads) for plan, loads in zip(placements, series[1:], strict=False)],
        moved_slots=[int(move.slots.sum()) / slots for move in moves],
        fetched=[int(move.fetches.sum()) / slots for move in moves],
        duplicates=[int(plan.duplicates().sum()) / slots for plan in placements],
    )


def same_layers(left: Placement, right: Placement) -> tuple[Tensor, Tensor]:
    """Which layers [L] have equal counts, and which have equal maps too.

    Maps are equal if on every node the sorted list over its GPUs of the sorted experts on them is.
    """
    counts = (left.logcnt == right.logcnt).all(1)
    maps = (canonical(left.phy2log, left.topology) == canonical(right.phy2log, right.topology)).all(1)
    return counts, counts & maps


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
