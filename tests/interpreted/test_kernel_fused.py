"""The fused kernel in the interpreter: the plan, bit for bit, that the reference makes. Outputs and scratch are
poisoned before every launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eplb_reference import plan_layers
from eplb_triton import POLICIES, Policy, Topology
from eplb_triton.kernels import specs
from eplb_triton.kernels.launcher import Outputs, first_bad_load, launch
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.policy import Fixup, Nearest
from tests.cases import FAMILIES, GoldenCase, Shape, golden_cases, loads
from tests.comparing import assert_same
from tests.sizes import chosen, full_unless

HIERARCHICAL = {
    "plain": Shape(12, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)),
    "odd": Shape(21, Topology(num_replicas=30, num_gpus=5, num_groups=6 + 1)),
    "capacity 1": Shape(8, Topology(num_replicas=12, num_gpus=12, num_groups=4, num_nodes=2)),
    "groups on nodes": Shape(12, Topology(num_replicas=18, num_gpus=6, num_groups=3, num_nodes=3)),
    "no redundancy": Shape(24, Topology(num_replicas=24, num_gpus=4, num_groups=6, num_nodes=2)),
    "largest": Shape(32, Topology(num_replicas=48, num_gpus=8, num_groups=8, num_nodes=2)),
}
GLOBAL = {
    "plain": Shape(16, Topology(num_replicas=24, num_gpus=4)),
    "odd": Shape(15, Topology(num_replicas=35, num_gpus=7, num_groups=3, num_nodes=2)),
    "capacity 1": Shape(7, Topology(num_replicas=11, num_gpus=11)),
    "one GPU": Shape(9, Topology(num_replicas=13, num_gpus=1)),
    "one expert": Shape(1, Topology(num_replicas=6, num_gpus=3)),
    "four times": Shape(6, Topology(num_replicas=24, num_gpus=6)),
    "no redundancy": Shape(20, Topology(num_replicas=20, num_gpus=5)),
    "two experts": Shape(2, Topology(num_replicas=9, num_gpus=3)),
}
V3 = {
    "hierarchical": Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4),
    "global": Topology(num_replicas=288, num_gpus=32),
}
CHOSEN = ("continuous", "ties")
"""Families of `make test`."""


def poisoned(
    weight: Tensor, topology: Topology, policy: Policy, dtype: torch.dtype = torch.int64, want_log2phy: bool = True
) -> Outputs:
    """A launch into outputs and scratch that hold nothing usable."""
    num_layers, experts = weight.shape
    plan = launch_plan(topology, experts, policy, weight_dtype=weight.dtype, dtype=dtype, want_log2phy=want_log2phy)
    slots = num_layers, topology.num_replicas
    out = Outputs(
        torch.full(slots, -7, dtype=dtype),
        torch.full(slots, -7, dtype=dtype),
        torch.full((num_layers, experts), -7, dtype=dtype),
        torch.full((num_layers, experts, slots[1] - experts + 1), -7, dtype=dtype) if want_log2phy else None,
        torch.full((num_layers, plan.num_nodes), -7, dtype=torch.int32),
    )
    workspace = plan.workspace(num_layers, "cpu")
    for scratch in workspace:
        scratch.fill_(torch.nan if scratch.is_floating_point() else -7)
    assert launch(weight, topology, policy, out=out, workspace=workspace) is out
    return out


def check(weight: Tensor, topology: Topology, policy: Policy) -> None:
    """Every output is what the reference gives."""
    got = poisoned(weight, topology, policy)
    phy2log, phyrank, logcnt = plan_layers(weight, topology, policy)
    assert_same(got.logcnt, logcnt, "logcnt")
    assert_same(got.phy2log, phy2log, "phy2log")
    assert_same(got.phyrank, phyrank, "phyrank")
    assert got.log2phy is not None
    assert_same(got.log2phy, log2phy(phy2log, phyrank, got.log2phy.shape), "log2phy")
    assert bool((got.bad == -1).all())


def log2phy(phy2log: Tensor, phyrank: Tensor, shape: torch.Size) -> Tensor:
    """The inverse map [L, E, P - E + 1], written from its definition."""
    inverse = torch.full(shape, -1)
    for layer, (experts, ranks) in enumerate(zip(phy2log.tolist(), phyrank.tolist(), strict=True)):
        for slot, (expert, rank) in enumerate(zip(experts, ranks, strict=True)):
            inverse[layer, expert, rank] = slot
    return inverse


def _rotating(shapes: dict[str, Shape]) -> Iterator[Any]:
    """Every policy with every family, the shapes in turn, so that every policy meets every shape; in `make test` every
    shape meets a policy."""
    for number, policy in enumerate(POLICIES):
        for at, family in enumerate(FAMILIES):
            name = list(shapes)[(number + at) % len(shapes)]
            marks = full_unless(family in CHOSEN)
            yield pytest.param(policy, family, shapes[name], id=f"{policy}-{family}-{name}", marks=marks)


@pytest.mark.parametrize(("policy", "family", "shape"), list(_rotating(HIERARCHICAL)))
def test_hierarchical(policy: str, family: str, shape: Shape) -> None:
    check(loads(family, 1, 2, shape.experts), shape.topology, POLICIES[policy])


@pytest.mark.other_triton
@pytest.mark.parametrize(("policy", "family", "shape"), list(_rotating(GLOBAL)))
def test_global(policy: str, family: str, shape: Shape) -> None:
    check(loads(family, 2, 2, shape.experts), shape.topology, POLICIES[policy])


@pytest.mark.parametrize("family", chosen(FAMILIES, *CHOSEN))
@pytest.mark.parametrize("shape", [HIERARCHICAL["largest"], Shape(16, Topology(num_replicas=48, num_gpus=12))], ids=str)
def test_fast_paths_on_small_shapes(shape: Shape, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "ROUNDS_FROM", 2)
    monkeypatch.setattr(specs, "AT_ONCE_FROM", 1)
    launch_plan.cache_clear()
    for policy in ("deepseek", "top2_tail_adaptive_and_second_light_refine"):
        check(loads(family, 3, 1, shape.experts), shape.topology, POLICIES[policy])
    launch_plan.cache_clear()


def _v3() -> Iterator[Any]:
    """Every policy in both topologies of DeepSeek-V3; in `make test` in one of them, in turn."""
    for number, policy in enumerate(POLICIES):
        for at, (name, topology) in enumerate(V3.items()):
            yield pytest.param(policy, topology, id=f"{policy}-{name}", marks=full_unless(at == number % 2))


@pytest.mark.other_triton
@pytest.mark.parametrize(("policy", "topology"), list(_v3()))
def test_one_layer_of_deepseek_v3(policy: str, topology: Topology) -> None:
    check(loads("continuous", 4, 1, 256), topology, POLICIES[policy])


def _small(case: GoldenCase) -> bool:
    """Every shape of up to 48 replicas, of the stacks of 50 calls one: 4 minutes of the suite's 14, on one core."""
    return case.topology.num_replicas <= 48 and case.name.endswith(".0")


def _golden() -> Iterator[Any]:
    """Small recorded calls; in `make test` every sixth of them."""
    for number, case in enumerate(filter(_small, golden_cases("exact"))):
        yield pytest.param(case, id=case.name, marks=full_unless(number % 6 == 0))


@pytest.mark.parametrize("case", list(_golden()))
def test_golden_plans(case: GoldenCase) -> None:
    for policy, (phy2log, logcnt) in case.plans.items():
        if case.weight.shape[0] > 3 and policy != "deepseek":
            continue  # nine layers by six policies at 0.2 ms an operation: test_hierarchical and test_global do those
        got = poisoned(case.weight, case.topology, POLICIES[policy])
        assert_same(got.phy2log, phy2log, f"phy2log of {policy}")
        assert_same(got.logcnt, logcnt, f"logcnt of {policy}")


def test_a_policy_of_the_users_own() -> None:
    policy = Policy(
        "mixed",
        counts="simulated",
        fixup=Fixup(moves=2, donors="replicated", peak="second", tie="lexicographic"),
        group_refine=Nearest(steps=2, lights=2),
        gpu_pack="spread",
        gpu_refine=Nearest(steps=3, lights=1),
    )
    for family in ("continuous", "ties"):
        check(loads(family, 5, 2, 16), Topology(num_replicas=24, num_gpus=6, num_groups=8, num_nodes=2), policy)


def test_bad_loads_count_as_zero_and_are_recorded() -> None:
    topology = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    weight = loads("continuous", 6, 3, 12)
    weight[1, 9], weight[1, 4], weight[2, 11], weight[2, 0] = torch.nan, -1.0, torch.inf, 2.0**101
    weight[0, 3] = -0.0
    cleaned = torch.where((weight > 0) & (weight <= 2.0**100), weight, 0.0)
    for name in ("deepseek", "adaptive_tail_and_2x2_fixup"):  # with and without the kernel that measures rows first
        policy = POLICIES[name]
        got = poisoned(weight, topology, policy)
        assert_same(got.phy2log, plan_layers(cleaned, topology, policy)[0], f"phy2log of {name}")
        assert sorted(got.bad[0].tolist()) == [-1, -1]
        assert first_bad_load(got.bad) == (1, 4)
    assert first_bad_load(poisoned(cleaned, topology, POLICIES["deepseek"]).bad) is None


@pytest.mark.other_triton
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
def test_loads_of_any_type_are_rounded_once(dtype: torch.dtype) -> None:
    weight = loads("continuous", 7, 2, 12).clamp(max=100).to(dtype)
    if dtype == torch.int64:
        weight = weight + 2**53 + torch.arange(24).view(2, 12) * (2**29 + 1)  # a second rounding would show
    if dtype == torch.float64:
        weight = weight * (1 + 2.0**-25)
    got = poisoned(weight, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"])
    want = plan_layers(
        weight.to(torch.float32), Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    )
    assert_same(got.phy2log, want[0], "phy2log")


def test_strides_types_and_absent_maps() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    weight = loads("continuous", 8, 2, 12)
    want = poisoned(weight, topology, policy)
    spread = torch.full((12, 7), torch.nan)
    spread[:, 1:5:3] = weight.T
    got = launch(spread[:, 1:5:3].T, topology, policy, dtype=torch.int32, want_log2phy=True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.int32
        assert_same(mine.to(torch.int64), theirs.to(torch.int64), "a map")
    assert launch(weight, topology, policy).log2phy is None


@pytest.mark.parametrize("policy", POLICIES)
def test_no_layers(policy: str) -> None:
    got = launch(
        torch.empty(0, 12),
        Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2),
        POLICIES[policy],
        want_log2phy=True,
    )
    assert [tuple(tensor.shape) for tensor in got if tensor is not None] == [
        (0, 16),
        (0, 16),
        (0, 12),
        (0, 12, 5),
        (0, 2),
    ]


@pytest.mark.parametrize(
    ("field", "tensor", "message"),
    [
        ("phy2log", torch.zeros(2, 15, dtype=torch.int64), r"out.phy2log has shape \(2, 15\), must be \(2, 16\)"),
        ("phyrank", torch.zeros(2, 16, dtype=torch.int32), "out.phyrank has dtype torch.int32, must be torch.int64"),
        ("logcnt", torch.zeros(2, 12, dtype=torch.int64, device="meta"), "out.logcnt is on meta, must be on cpu"),
        ("logcnt", torch.zeros(12, 2, dtype=torch.int64).T, r"out.logcnt has strides \(1, 2\), must be contiguous"),
        (
            "log2phy",
            torch.zeros(2, 12, 4, dtype=torch.int64),
            r"out.log2phy has shape \(2, 12, 4\), must be \(2, 12, 5\)",
        ),
        ("bad", torch.zeros(2, 2, dtype=torch.int64), "out.bad has dtype torch.int64, must be torch.int32"),
    ],
)
def test_wrong_outputs_are_refused(field: str, tensor: Tensor, message: str) -> None:
    weight = loads("continuous", 9, 2, 12)
    good = launch(
        weight,
        Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2),
        POLICIES["deepseek"],
        want_log2phy=True,
    )
    with pytest.raises(ValueError, match=message):
        launch(
            weight,
            Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2),
            POLICIES["deepseek"],
            out=good._replace(**{field: tensor}),
        )


def test_wrong_workspace_is_refused() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    workspace = launch_plan(topology, 12, policy).workspace(3, "cpu")
    with pytest.raises(ValueError, match=r"workspace.statistics has shape \(3, 6\), must be \(3, 4\)"):
        launch(loads("continuous", 10, 2, 12), topology, policy, workspace=workspace)


@pytest.mark.parametrize(
    ("experts", "topology", "message"),
    [
        (2049, Topology(num_replicas=4096, num_gpus=1), "num_experts=2049 must be at most 2048"),
        (2048, Topology(num_replicas=4097, num_gpus=1), "num_replicas=4097 must be at most 4096"),
        (2048, Topology(num_replicas=2049, num_gpus=2049), "num_gpus=2049 must be at most 2048"),
        (12, Topology(num_replicas=10, num_gpus=1), "num_replicas=10 must be at least num_experts=12"),
    ],
)
def test_sizes_are_refused(experts: int, topology: Topology, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(torch.ones(1, experts), topology, POLICIES["deepseek"])


def test_wrong_weights_are_refused() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    with pytest.raises(ValueError, match=r"weight has shape \(12,\), must be \[layers, experts\]"):
        launch(torch.ones(12), topology, policy)
    with pytest.raises(ValueError, match=r"weight has dtype torch.bool, must be real or integer"):
        launch(torch.ones(1, 12, dtype=torch.bool), topology, policy)
    with pytest.raises(ValueError, match=r"dtype=torch.int16 must be torch.int64 or torch.int32"):
        launch(torch.ones(1, 12), topology, policy, dtype=torch.int16)
