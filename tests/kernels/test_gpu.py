"""The kernels on a GPU: the reference's bits, in graphs, on streams, without a wait and without an allocation.

Needs torch, triton, NumPy and pytest, nothing else. EPLB_ON_GPU=1 makes a missing GPU a failure. A shape costs seconds
to compile, loads cost nothing: the random cases are 50 draws each on four odd shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from eplb_triton import POLICIES, Topology, plan
from eplb_triton.kernels.launcher import Launch, Outputs, first_bad_load, launch
from eplb_triton.ops import rebalance
from eplb_triton.testing.families import FAMILIES, loads
from eplb_triton.testing.models import MODELS, ODD
from tests.comparing import assert_same

PLANNED = [name for name, policy in POLICIES.items() if policy.replan is None]
"""What the fused kernel plans; replanning is a kernel of its own."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("EPLB_ON_GPU") != "1", reason="no CUDA or ROCm device"
    ),
]

V3, TESTED = MODELS["v3-hierarchical"], [name for name in MODELS if name not in ("v3-144-gpus", "kimi-k3-like")]
V3_COUNTS = (V3.topology.num_replicas, V3.topology.num_groups, V3.topology.num_nodes, V3.topology.num_gpus)


def _assert_plan(out: Outputs, weight: Tensor, topology: Topology, policy: str) -> None:
    """`out` is, bit for bit, what the reference makes of `weight` (on the CPU)."""
    want = plan(weight, topology, policy=policy, backend="reference")
    for name in ("phy2log", "phyrank", "logcnt", "log2phy"):
        got = getattr(out, name)
        if got is not None:
            its = want.slots_of_experts() if name == "log2phy" else getattr(want, name)
            assert_same(got.cpu().long(), its, name)


def _v3(seed: int = 0, family: str = "continuous") -> Tensor:
    return loads(family, seed, V3.layers, V3.experts)


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("policy", PLANNED)
def test_random_cases(policy: str, shape: str) -> None:
    _, experts, topology = ODD[shape]
    for draw in range(50):
        weight = loads(list(FAMILIES)[draw % len(FAMILIES)], draw, 1 + draw % 7, experts)
        _assert_plan(launch(weight.cuda(), topology, POLICIES[policy], want_log2phy=True), weight, topology, policy)


@pytest.mark.parametrize("case", TESTED)
@pytest.mark.parametrize("policy", PLANNED)
def test_models(policy: str, case: str) -> None:
    shape = MODELS[case]
    for seed, family in enumerate(("continuous", "ties")):
        weight = loads(family, seed, min(shape.layers, 16), shape.experts)
        out = launch(weight.cuda(), shape.topology, POLICIES[policy], want_log2phy=shape is V3)
        _assert_plan(out, weight, shape.topology, policy)


@pytest.mark.parametrize("policy", PLANNED)
def test_public_entry(policy: str) -> None:
    weight = _v3()
    want = plan(weight, V3.topology, policy=policy, backend="reference")
    for backend in ("triton", "auto"):
        got = plan(weight.cuda(), V3.topology, policy=policy, backend=backend)
        assert got.phy2log.is_cuda
        assert got.phy2log.dtype == torch.int64
        assert got.fingerprint() == want.fingerprint()
        assert_same(got.slots_of_experts().cpu(), want.slots_of_experts(), "log2phy")
        got.validate()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_load_types(dtype: torch.dtype) -> None:
    weight = (_v3() % 200).to(dtype)
    _assert_plan(launch(weight.cuda(), V3.topology, POLICIES["deepseek"]), weight, V3.topology, "deepseek")


def test_any_strides() -> None:
    weight = _v3()
    transposed = weight.T.contiguous().cuda().T
    every_other = torch.zeros(2 * V3.layers, 3 * V3.experts, device="cuda")[::2, ::3]
    every_other.copy_(weight)
    for strided in (transposed, every_other):
        assert not strided.is_contiguous()
        _assert_plan(launch(strided, V3.topology, POLICIES["deepseek"]), weight, V3.topology, "deepseek")


def test_int32() -> None:
    out = launch(_v3().cuda(), V3.topology, POLICIES["deepseek"], dtype=torch.int32, want_log2phy=True)
    assert {tensor.dtype for tensor in out if tensor is not None} == {torch.int32}
    _assert_plan(out, _v3(), V3.topology, "deepseek")


def test_no_layers() -> None:
    out = launch(torch.zeros(0, V3.experts, device="cuda"), V3.topology, POLICIES["deepseek"], want_log2phy=True)
    assert out.phy2log.shape == (0, V3.topology.num_replicas)


def _empty_outputs(layers: int) -> Outputs:
    replicas, experts, nodes = V3.topology.num_replicas, V3.experts, V3.topology.planned_nodes
    sizes = ((replicas,), (replicas,), (experts,), (experts, replicas - experts + 1), (nodes,))
    maps = [torch.full((layers, *size), -7, dtype=torch.int64, device="cuda") for size in sizes]  # poison
    return Outputs(maps[0], maps[1], maps[2], maps[3], maps[4].int())


def _planned(policy: str) -> Launch:
    width = V3.topology.num_replicas - V3.experts + 1
    return Launch(V3.topology, V3.layers, V3.experts, POLICIES[policy], log2phy_width=width, device="cuda")


@pytest.mark.parametrize("policy", PLANNED)
def test_out_allocates_nothing(policy: str) -> None:
    weight = _v3().cuda()
    out = _empty_outputs(V3.layers)
    planned = _planned(policy)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    planned(weight, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    _assert_plan(out, weight.cpu(), V3.topology, policy)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Any wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", PLANNED)
def test_never_waits(policy: str) -> None:
    weight = _v3().cuda()
    launch(weight, V3.topology, POLICIES[policy])
    torch.cuda.synchronize()
    with _no_waiting():
        launch(weight, V3.topology, POLICIES[policy], want_log2phy=True)
        plan(weight, V3.topology, policy=policy, backend="triton")


@pytest.mark.parametrize("policy", PLANNED)
def test_graph_replays_on_changed_loads(policy: str) -> None:
    weight = _v3().cuda()
    out = _empty_outputs(V3.layers)
    planned = _planned(policy)  # whose first launch is the captured one
    plan(weight, V3.topology, policy=policy, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned(weight, out)
        through_plan = plan(weight, V3.topology, policy=policy, backend="triton")
    for seed, family in enumerate(FAMILIES):
        fresh = _v3(seed, family)
        weight.copy_(fresh)
        graph.replay()
        _assert_plan(out, fresh, V3.topology, policy)
        assert_same(through_plan.phy2log.cpu(), out.phy2log.cpu(), f"phy2log of {family}")


@pytest.mark.parametrize("policy", PLANNED)
def test_two_streams_at_once(policy: str) -> None:
    weights = [_v3(seed, family).cuda() for seed, family in enumerate(("continuous", "ties"))]
    want = [launch(weight, V3.topology, POLICIES[policy]).phy2log for weight in weights]
    streams = [torch.cuda.Stream() for _ in weights]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[] for _ in weights]
    for _ in range(50):
        for stream, weight, plans in zip(streams, weights, got, strict=True):
            with torch.cuda.stream(stream):
                plans.append(launch(weight, V3.topology, POLICIES[policy]).phy2log)
    torch.cuda.synchronize()
    for plans, right in zip(got, want, strict=True):
        assert all(torch.equal(phy2log, right) for phy2log in plans)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 2.0**101])
def test_bad_loads_count_as_zero(bad: float) -> None:
    weight = _v3()
    weight[3, 17] = weight[5, 2] = bad
    policy = "adaptive_tail_and_2x2_fixup"
    out = launch(weight.cuda(), V3.topology, POLICIES[policy], want_log2phy=True)
    assert first_bad_load(out.bad) == (3, 17)
    with pytest.raises(ValueError, match=r"weight\[3, 17\]"):
        plan(weight.cuda(), V3.topology, policy=policy, check="sync")
    weight[3, 17] = weight[5, 2] = 0.0
    _assert_plan(out, weight, V3.topology, policy)
    assert first_bad_load(launch(weight.cuda(), V3.topology, POLICIES["deepseek"]).bad) is None


@pytest.mark.parametrize("policy", ["deepseek", "adaptive_tail_and_2x2_fixup"])  # one launch, and two
def test_traced_whole_by_torch_compile(policy: str) -> None:
    def step(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rebalance(weight * 2.0, *V3_COUNTS, policy)  # type: ignore[no-any-return]

    traced = torch.compile(step, fullgraph=True)
    for seed in range(2):
        weight = _v3(seed)
        want = plan(weight * 2.0, V3.topology, policy=policy, backend="reference")
        phy2log, log2phy, logcnt = traced(weight.cuda())
        assert_same(phy2log.cpu(), want.phy2log, "phy2log")
        assert_same(log2phy.cpu(), want.slots_of_experts(), "log2phy")
        assert_same(logcnt.cpu(), want.logcnt, "logcnt")


def test_operator_checks() -> None:
    torch.library.opcheck(rebalance, (_v3()[:2].cuda(), *V3_COUNTS, "deepseek"))
