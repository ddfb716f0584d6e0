"""The fused kernel in the interpreter: the plan, bit for bit, that the reference makes. Outputs and scratch are
poisoned before every launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from eplb_triton import POLICIES, Policy, Topology
from eplb_triton.kernels import shapes
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.policy import Exchange, Fixup, Nearest
from tests.cases import FAMILIES, GoldenCase, Shape, golden_cases, loads
from tests.comparing import assert_same
from tests.kernels.interpreted.launches import check, poisoned
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
