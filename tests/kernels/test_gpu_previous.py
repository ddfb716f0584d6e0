"""On a GPU, from a placement in force: the reference's maps, renumbered or replanned, without a wait or an allocation,
from a captured graph."""

from __future__ import annotations

import os

import pytest
import torch

from eplb_triton import Placement, Planner, Topology
from eplb_triton.synthetic import lognormal_series

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("EPLB_ON_GPU") != "1", reason="no CUDA or ROCm device"
    ),
]

LAYERS, EXPERTS, STEPS = 3, 64, 4
TOPOLOGIES = {
    "global": Topology(num_replicas=80, num_gpus=16),
    "grouped": Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2),
    "two slots": Topology(num_replicas=80, num_gpus=40),
}
MAPS = ("phy2log", "phyrank", "logcnt", "log2phy", "bad", "classes")


def _planner(policy: str, topology: Topology, backend: str, dtype: torch.dtype = torch.int64) -> Planner:
    sizes = topology, LAYERS, EXPERTS
    device = "cuda" if backend == "triton" else "cpu"
    return Planner(*sizes, policy=policy, device=device, backend=backend, dtype=dtype, log2phy=17, steps=STEPS)


def _windows(number: int) -> list[torch.Tensor]:
    """[STEPS, L, E] each."""
    series = lognormal_series(number * STEPS, LAYERS, EXPERTS, tokens_per_step=4096, drift=0.05, seed=4)
    return list(series.float().view(number, STEPS, LAYERS, EXPERTS))


def _same(got: Placement, want: Placement) -> None:
    for name in MAPS:
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", TOPOLOGIES)
@pytest.mark.parametrize("policy", ["balanced", "deepseek", "steady"])
def test_the_references_plans(policy: str, shape: str, dtype: torch.dtype) -> None:
    ours, theirs = (_planner(policy, TOPOLOGIES[shape], backend, dtype) for backend in ("triton", "reference"))
    first, second = (window if policy == "steady" else window.sum(0) for window in _windows(2))
    live, want_live = ours(first.cuda()), theirs(first)
    _same(live, want_live)
    _same(ours(second.cuda(), previous=live), theirs(second, previous=want_live))


@pytest.mark.parametrize("policy", ["balanced", "steady"])
def test_a_captured_call_neither_waits_nor_allocates(policy: str) -> None:
    """The first call is the captured one; it follows the loads and what is in force."""
    topology = TOPOLOGIES["grouped"]
    ours, theirs = (_planner(policy, topology, backend) for backend in ("triton", "reference"))
    windows = [window if policy == "steady" else window.sum(0) for window in _windows(3)]
    loads, live, ahead = windows[0].cuda(), ours.empty(), ours.empty()
    live.copy_(theirs(windows[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours(loads, out=ahead, previous=live)
    in_force = theirs(windows[0])
    for window in windows[1:]:
        loads.copy_(window)
        graph.replay()
        want = theirs(window, previous=in_force)
        _same(ahead, want)
        live.copy_(ahead)
        in_force.copy_(want)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(loads, out=ahead, previous=live)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
