"""Launches of the fused kernel for tests: into memory that holds nothing usable, and every output compared."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference import plan_layers
from eplb_triton import Policy, Topology
from eplb_triton.kernels.launcher import Launch, Outputs
from tests.comparing import assert_same


def poisoned(
    weight: Tensor, topology: Topology, policy: Policy, dtype: torch.dtype = torch.int64, want_log2phy: bool = True
) -> Outputs:
    """A launch into maps and scratch that hold nothing usable."""
    num_layers, experts = weight.shape
    shapes = topology.map_shapes(num_layers, experts, log2phy=want_log2phy)
    maps = {
        name: torch.full(shape, -7, dtype=torch.int32 if name == "bad" else dtype) for name, shape in shapes.items()
    }
    out = Outputs(maps["phy2log"], maps["phyrank"], maps["logcnt"], maps.get("log2phy"), maps["bad"])
    width = out.log2phy.shape[2] if out.log2phy is not None else None
    planned = Launch(
        topology, num_layers, experts, policy, loads_dtype=weight.dtype, dtype=dtype, log2phy_width=width, device="cpu"
    )
    planned.scratch.fill_(0xCB)  # negative integers, float32 and float64 of large size
    planned(weight, out)
    return out


def check(weight: Tensor, topology: Topology, policy: Policy) -> Outputs:
    """Every output is what the reference gives."""
    got = poisoned(weight, topology, policy)
    phy2log, phyrank, logcnt = plan_layers(weight, topology, policy)
    assert_same(got.logcnt, logcnt, "logcnt")
    assert_same(got.phy2log, phy2log, "phy2log")
    assert_same(got.phyrank, phyrank, "phyrank")
    assert got.log2phy is not None
    assert_same(got.log2phy, log2phy(phy2log, phyrank, got.log2phy.shape), "log2phy")
    assert bool((got.bad == -1).all())
    return got


def log2phy(phy2log: Tensor, phyrank: Tensor, shape: torch.Size) -> Tensor:
    """The inverse map [L, E, P - E + 1], written from its definition."""
    inverse = torch.full(shape, -1)
    for layer, (experts, ranks) in enumerate(zip(phy2log.tolist(), phyrank.tolist(), strict=True)):
        for slot, (expert, rank) in enumerate(zip(experts, ranks, strict=True)):
            inverse[layer, expert, rank] = slot
    return inverse
