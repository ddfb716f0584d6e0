"""Every kernel stage alone, in the interpreter: equal to its twin in the reference, and to the golden stages."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_reference import fixup, replicate, replicate_waterfill
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.buffers import Replicas
from eplb_triton.kernels.fixup import move_replicas
from eplb_triton.kernels.measure import measure_rows
from eplb_triton.kernels.replicate import (
    dispersion_tail,
    fixed_tail,
    pick_dhondt,
    pick_gated,
    pick_peak_aware,
    pick_sainte_lague,
    simulated_tail,
)
from eplb_triton.kernels.replicate_waterfill import list_by_expert, waterfill_counts
from eplb_triton.kernels.shapes import Moving
from eplb_triton.kernels.specs import launch_plan
from tests.cases import loads, stage_arrays, stage_groups
from tests.comparing import assert_each_same, assert_same
from tests.kernels.interpreted.stage_tools import CHOSEN, replicating, scratch
from tests.sizes import chosen

PICKS = {
    "dhondt": replicate.pick_dhondt,
    "sainte_lague": replicate.pick_sainte_lague,
    "peak_aware": replicate.pick_peak_aware,
    "gated": replicate.pick_gated,
}


@triton.jit
def _pick(
    given,  # Replicas of all rows; scratch of one
    START: tl.constexpr,
    STOP: tl.constexpr,
    RULE: tl.constexpr,
    shape: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    NUM: tl.constexpr = shape.num_experts
    counts_ptr = given.counts + row * NUM
    counts = tl.load(counts_ptr + lane, mask=lane < NUM, other=1)
    replicas = Replicas(
        given.loads + row * NUM, given.expert + row * STOP, given.rank + row * STOP, counts_ptr, None, given.average,
        given.spare, given.keys,
    )  # fmt: skip
    if RULE == "dhondt":
        counts = pick_dhondt(replicas, counts, START, STOP, True, True, shape)
    elif RULE == "sainte_lague":
        counts = pick_sainte_lague(replicas, counts, START, STOP, True, shape)
    elif RULE == "peak_aware":
        counts = pick_peak_aware(replicas, counts, START, STOP, shape)
    else:
        counts = pick_gated(replicas, counts, START, STOP, shape)
    tl.store(counts_ptr + lane, counts, mask=lane < NUM)


def _replicas(weight: Tensor, counts: Tensor, expert: Tensor | None, rank: Tensor | None) -> Replicas:
    room = scratch(64, torch.float32), scratch(64, torch.int32), scratch(64, torch.int64)
    return Replicas(weight, expert, rank, counts, None, *room)


def _picked(rule: str, weight: Tensor, counts: Tensor, start: int, stop: int, at_once: bool) -> tuple[Tensor, ...]:
    rows, num = weight.shape
    got = counts.to(torch.int32), *(torch.full((rows, stop), -7, dtype=torch.int32) for _ in range(2))
    _pick[(rows,)](_replicas(weight, *got), START=start, STOP=stop, RULE=rule, shape=replicating(num, stop, at_once))
    return got


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("rule", PICKS)
def test_picks(rule: str, family: str) -> None:
    for num, start, stop in ((1, 1, 4), (7, 9, 15), (20, 20, 26)):
        weight = loads(family, num, 3, num)
        counts = torch.ones(weight.shape, dtype=torch.int64)
        if start > num:
            counts += torch.arange(num) % 3
        expert, rank = torch.full((2, 3, stop), -7)
        got = _picked(rule, weight, counts, start, stop, at_once=False)
        PICKS[rule](weight, counts, expert, rank, start, stop)
        assert_each_same(map(Tensor.long, got), (counts, expert, rank), "counts", "expert", "rank")


@pytest.mark.parametrize("family", CHOSEN)
def test_dhondt_at_once(family: str) -> None:
    for num, stop in ((1, 40), (5, 25), (32, 64), (32, 60)):
        weight = loads(family, num + stop, 3, num)
        counts = torch.ones(weight.shape, dtype=torch.int64)
        expert, rank = torch.full((2, 3, stop), -7)
        got = _picked("dhondt", weight, counts, num, stop, at_once=True)
        replicate.pick_dhondt(weight, counts, expert, rank, num, stop)
        assert_each_same(map(Tensor.long, got), (counts, expert, rank), "counts", "expert", "rank")


@triton.jit
def _tails(statistics_ptr, num_rows, out_ptr, NUM_REDUNDANT: tl.constexpr, RULE: tl.constexpr):
    if RULE == "dispersion":
        tl.store(out_ptr, dispersion_tail(statistics_ptr, num_rows, NUM_REDUNDANT))
    elif RULE == "simulated":
        tl.store(out_ptr, simulated_tail(statistics_ptr, num_rows, NUM_REDUNDANT))
    else:
        tl.store(out_ptr, fixed_tail(NUM_REDUNDANT))


def _tail(rule: str, redundant: int, statistics: Tensor) -> int:
    out = torch.full((1,), -7, dtype=torch.int32)
    _tails[(1,)](statistics, statistics.shape[-1], out, NUM_REDUNDANT=redundant, RULE=rule)
    return int(out)


@pytest.mark.parametrize("redundant", [1, 2, 9, 10, 11, 20, 100, 1024])
def test_fixed_tail(redundant: int) -> None:
    assert _tail("fixed", redundant, torch.zeros(1, 1)) == replicate.fixed_tail(redundant)


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("rule", ["dispersion", "simulated"])
def test_tails_with_a_mean_over_rows(rule: str, family: str) -> None:
    policy = next(policy for policy in POLICIES.values() if policy.counts == rule)
    reference = replicate.dispersion_tail if rule == "dispersion" else replicate.simulated_tail
    for experts, replicas, layers in ((1, 6, 2), (12, 18, 3), (6, 32, 17), (24, 25, 2)):
        weight = loads(family, experts, layers, experts)
        plan = launch_plan(Topology(num_replicas=replicas, num_gpus=1), experts, policy)
        scratch = plan.scratch(layers, "cpu")
        statistics = scratch[plan.scratch_bytes(layers) - 3 * 8 * layers :].view(torch.float64).view(3, layers)
        kernel = plan.kernels[0]
        assert kernel.function is measure_rows
        kernel.function[plan.grid(layers)](weight, experts, 1, layers, scratch, plan.partitions("cpu"), plan.shape)
        redundant = replicas - experts
        assert _tail(rule, redundant, statistics) == reference(weight, redundant)


@triton.jit
def _waterfill(given, shape: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    NUM: tl.constexpr = shape.num_experts
    first = row * shape.num_replicas
    replicas = Replicas(
        given.loads + row * NUM, given.expert + first, given.rank + first, given.counts + row * NUM, None,
        given.average, given.spare, given.keys,
    )  # fmt: skip
    counts = waterfill_counts(replicas, shape)
    tl.store(replicas.counts + lane, counts, mask=lane < NUM)
    list_by_expert(counts, replicas, shape)


@pytest.mark.parametrize("family", CHOSEN)
def test_waterfill(family: str) -> None:
    for num, replicas in ((1, 5), (6, 6), (7, 28), (20, 36), (32, 50)):
        weight = loads(family, replicas, 2, num)
        got = torch.full((2, num), -7, dtype=torch.int32), *torch.full((2, 2, replicas), -7, dtype=torch.int32)
        _waterfill[(2,)](_replicas(weight, *got), shape=replicating(num, replicas))
        counts = replicate_waterfill.waterfill_counts(weight, replicas)
        want = counts, *replicate_waterfill.list_by_expert(counts)
        assert_each_same(map(Tensor.long, got), want, "counts", "expert", "rank")


@triton.jit
def _move(given, rule: tl.constexpr, shape: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    NUM: tl.constexpr = shape.num_experts
    counts_ptr = given.counts + row * NUM
    counts = tl.load(counts_ptr + lane, mask=lane < NUM, other=0)
    expert = given.expert + row * shape.num_replicas if given.expert is not None else None
    rank = given.rank + row * shape.num_replicas if given.rank is not None else None
    replicas = Replicas(given.loads + row * NUM, expert, rank, counts_ptr, None, None, None, None)
    counts = move_replicas(replicas, counts, given.expert is not None, rule, shape)
    tl.store(counts_ptr + lane, counts, mask=lane < NUM)


@pytest.mark.parametrize("group", stage_groups("fixup"))
def test_golden_fixups(group: str) -> None:
    _, moves, donors, peak, tie = group.removeprefix("fixup/").split(" ")
    states = stage_arrays(group)
    counts = states["counts"].to(torch.int32)
    rows, num = counts.shape
    rule = Moving(int(moves), donors, peak, tie)
    _move[(rows,)](_replicas(states["weight"], counts, None, None), rule=rule, shape=replicating(num, 0))
    assert_same(counts.to(torch.int64), states["after"], "counts")


@pytest.mark.parametrize("tie", ["first", "second_peak", "lexicographic"])
@pytest.mark.parametrize("donors", chosen(["top", "replicated"], "replicated"))
@pytest.mark.parametrize("peak", ["second", "others", "exact"])
def test_fixups_of_the_list(peak: str, donors: str, tie: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for num in (2, 3, 9):
        counts = torch.randint(1, 4, (12, num), generator=generator)
        counts[:, 0] += 30 - counts.sum(1)
        weight = torch.randint(0, 60, (12, num), generator=generator).to(torch.float32)
        expert, rank = replicate_waterfill.list_by_expert(counts)
        got = counts.to(torch.int32), expert.to(torch.int32), rank.to(torch.int32)
        _move[(12,)](_replicas(weight, *got), rule=Moving(3, donors, peak, tie), shape=replicating(num, 30))
        fixup.move_replicas(weight, counts, expert, rank, 3, donors, peak, tie)  # type: ignore[arg-type]
        assert_each_same(map(Tensor.long, got), (counts, expert, rank), "counts", "expert", "rank")
