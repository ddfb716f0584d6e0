"""The fused kernel in the interpreter: the plan, bit for bit, that the reference makes. Outputs and scratch are
poisoned before every launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from eplb_reference import plan_layers
from eplb_triton import POLICIES, Policy, Topology
from eplb_triton.kernels import shapes
from eplb_triton.kernels.launcher import Launch, Outputs, first_bad_load, launch
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.policy import Exchange, Fixup, Nearest
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
    monkeypatch.setattr(shapes, "ROUNDS_FROM", 2)
    monkeypatch.setattr(shapes, "AT_ONCE_FROM", 1)
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
    """Small recorded calls."""
    for case in filter(_small, golden_cases("exact")):
        few = case.name in ("0.0", "9.0", "21.0", "stack756.0")
        yield pytest.param(case, id=case.name, marks=full_unless(few))


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


@pytest.mark.parametrize(
    ("shape", "candidates"),
    [
        (Shape(50, Topology(num_replicas=80, num_gpus=2)), 1 << 20),  # bits of 40 slots; few labels have several items
        (Shape(40, Topology(num_replicas=80, num_gpus=2)), 1 << 20),  # many have
        (Shape(100, Topology(num_replicas=130, num_gpus=2)), 1 << 24),  # 65 slots: no word has so many bits
    ],
    ids=str,
)
def test_more_slots_than_a_word_has_bits(shape: Shape, candidates: int) -> None:
    policy = Policy("doubles", counts="capped", gpu_pack="blocks", gpu_refine=Exchange(0, 0, 3, 2, candidates))
    got = check(loads("continuous", 11, 1, shape.experts), shape.topology, policy)
    for gpu in got.phy2log.view(shape.topology.num_gpus, -1).tolist():
        assert len(set(gpu)) == len(gpu)  # counts are capped: no expert need be there twice


def test_no_shift_by_the_bits_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may make anything of one; the interpreter makes it 0, which is right by chance."""
    shift, seen = InterpreterBuilder.create_shl, []

    def watched(self: InterpreterBuilder, value: Any, by: Any) -> Any:
        seen.append(np.all((by.data >= 0) & (by.data < 8 * value.data.itemsize)))
        return shift(self, value, by)

    monkeypatch.setattr(InterpreterBuilder, "create_shl", watched)
    weight = torch.cat((torch.full((1, 32), 2.0), torch.full((1, 8), 1.0)), 1)
    check(weight, Topology(num_replicas=72, num_gpus=8), POLICIES["balanced"])  # 32 labels of two items, then 8 of one
    assert all(seen)
    assert seen


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


def test_wrong_types_are_refused() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    with pytest.raises(ValueError, match=r"loads_dtype=torch.bool must be one of torch.float16"):
        Launch(topology, 1, 12, policy, loads_dtype=torch.bool, device="cpu")
    with pytest.raises(ValueError, match=r"dtype=torch.int16 must be torch.int64 or torch.int32"):
        Launch(topology, 1, 12, policy, dtype=torch.int16, device="cpu")
    with pytest.raises(ValueError, match=r"log2phy_width=0 must be at least 1"):
        Launch(topology, 1, 12, policy, log2phy_width=0, device="cpu")
    with pytest.raises(ValueError, match=r"num_layers=-1 must be at least 0"):
        Launch(topology, -1, 12, policy, device="cpu")


def test_log2phy_of_any_width_and_strides() -> None:
    """Rows that lie apart and are wider or narrower than the plan needs; what is left out is told."""
    topology, policy = Topology(num_replicas=24, num_gpus=6, num_groups=2, num_nodes=2), POLICIES["deepseek"]
    weight = torch.ones(2, 12)
    weight[0, 3] = 1000.0  # 7 replicas
    want = poisoned(weight, topology, policy)
    assert want.log2phy is not None
    for width in (1, 3, 7, 13, 20):
        room = torch.full((2, 14, 40), -7)
        view = room[:, 1:13, 5 : 5 + width]
        got = want._replace(log2phy=view, bad=torch.full((2, 2), -7, dtype=torch.int32))
        Launch(topology, 2, 12, policy, log2phy_width=width, device="cpu")(weight, got)
        whole = torch.nn.functional.pad(want.log2phy, (0, 20), value=-1)
        assert torch.equal(view, whole[..., :width])
        room[:, 1:13, 5 : 5 + width] = -7
        assert bool((room == -7).all())
        crowded = want.logcnt.view(2, 2, 6).amax(2) > width  # group g is on node g
        assert torch.equal(got.bad, torch.where(crowded, -2, -1).to(torch.int32))


def test_partitions_are_owned_by_the_launch() -> None:
    topology = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    first = Launch(topology, 1, 12, POLICIES["balanced"], device="cpu")
    address = first.partitions.data_ptr()
    assert first.partitions.shape == (3, 4)
    for groups in range(6, 76):  # more tables than any cache of old ones would hold
        others = Topology(num_replicas=groups, num_gpus=1, num_groups=groups)
        Launch(others, 0, groups, POLICIES["balanced"], device="cpu")
    again = Launch(topology, 1, 12, POLICIES["balanced"], device="cpu")
    assert again.partitions.data_ptr() == address
