"""The planner through the replanning kernel.

Not with Triton 3.4, whose interpreter takes a range with a tensor's bound with NumPy below 2.4 alone.
"""

from __future__ import annotations

import pytest
import torch

from eplb_triton import Placement, Planner, Topology
from tests.cases import loads

TOPOLOGY = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
EXPERTS = 12
MAPS = ("phy2log", "phyrank", "logcnt", "log2phy")


@pytest.mark.parametrize("topology", [TOPOLOGY, Topology(num_replicas=16, num_gpus=8)], ids=["grouped", "global"])
def test_replanning_through_the_planner(topology: Topology) -> None:
    """A first plan and a second one from it: the reference's maps, and what it says of them."""
    first, second = (
        torch.stack([loads("continuous", seed + step, 2, EXPERTS) for step in range(6)]) for seed in (1, 60)
    )
    made: dict[str, list[Placement]] = {}
    for backend in ("triton", "reference"):
        planner = Planner(topology, 2, EXPERTS, policy="steady", backend=backend, steps=8, log2phy=True)
        live = planner(first)
        made[backend] = [live, planner(second, previous=live, moves=5)]
    for got, want in zip(*made.values(), strict=True):
        for name in (*MAPS, "bad", "classes"):
            assert getattr(got, name).equal(getattr(want, name)), name
        assert got.changes is not None
        assert want.changes is not None
        for name, ours, theirs in zip(got.changes._fields, got.changes, want.changes, strict=True):
            assert ours.nan_to_num(-1).equal(theirs.nan_to_num(-1)), name
    assert 0 < int(made["triton"][1].moved(made["triton"][0]).slots.max()) <= 5
