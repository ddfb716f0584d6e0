"""Plans recorded from the original programs and from a careful reading of the specification."""

from __future__ import annotations

import pytest
import torch

from eplb_reference import fixup, pack, refine
from eplb_triton import Topology, plan, rebalance_experts
from tests.backends import CPU_BACKENDS
from tests.cases import PUBLISHED, golden_cases, stage_arrays, stage_groups, unordered
from tests.comparing import assert_each_same, assert_same


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("policy", PUBLISHED)
def test_exact_slot_by_slot(policy: str, backend: str) -> None:
    cases = 0
    for case in golden_cases("exact"):
        if policy not in case.plans:
            continue
        phy2log, logcnt = case.plans[policy]
        got = plan(case.weight, case.topology, policy=policy, backend=backend)
        assert_same(got.phy2log, phy2log, f"phy2log of {case.name}")
        assert_same(got.logcnt, logcnt, f"logcnt of {case.name}")
        cases += 1
    assert cases == 649


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("policy", PUBLISHED)
def test_placements_of_the_original_programs(policy: str, backend: str) -> None:
    cases = 0
    for case in golden_cases("placements"):
        if policy not in case.plans:
            continue
        phy2log, logcnt = case.plans[policy]
        got = plan(case.weight, case.topology, policy=policy, backend=backend)
        assert_same(got.logcnt, logcnt, f"logcnt of {case.name}")
        assert unordered(got.phy2log, case.topology) == unordered(phy2log, case.topology), case.name
        cases += 1
    assert cases == (48 if policy == "deepseek" else 45)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_deepseeks_documented_example(backend: str) -> None:
    weight = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    phy2log, log2phy, logcnt = rebalance_experts(weight, 16, 4, 2, 8, backend=backend)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert logcnt.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert log2phy.shape == (2, 12, 5)
    assert log2phy[0, 5].tolist() == [0, 2, -1, -1, -1]
    assert plan(
        weight, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), policy="deepseek", backend=backend
    ).phy2log.equal(phy2log)


@pytest.mark.parametrize("group", stage_groups("fixup"))
def test_fixup_stage(group: str) -> None:
    _, moves, donors, peak, tie = group.split("/")[1].split()
    state = stage_arrays(group)
    counts = state["counts"]
    fixup.move_replicas(state["weight"], counts, None, None, int(moves), donors, peak, tie)  # type: ignore[arg-type]
    assert_same(counts, state["after"], "counts")


@pytest.mark.parametrize("group", stage_groups("refine"))
def test_refine_stage(group: str) -> None:
    num_packs, rule, *numbers = group.split("/")[1].split()
    state = stage_arrays(group)
    position = state["weight"], state["pack"], state["slot"], int(num_packs)
    if rule == "nearest":
        steps, lights = map(int, numbers)
        got = refine.refine_nearest(*position, steps, lights)
    elif rule == "corner":
        got = refine.refine_corner(*position, int(numbers[0]))
    else:
        got = refine.refine_peak(state["weight"], state["labels"], *position[1:])
    assert_each_same(got, (state["pack_after"], state["slot_after"]), "packs", "slots")


@pytest.mark.parametrize("group", stage_groups("spread"))
def test_spread_stage(group: str) -> None:
    state = stage_arrays(group)
    got = pack.pack_spread(state["weight"], state["labels"], int(group.split("/")[1]))
    assert_each_same(got, (state["pack"], state["slot"]), "packs", "slots")
