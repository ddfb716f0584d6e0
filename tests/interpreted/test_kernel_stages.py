"""Every kernel stage alone, in the interpreter: equal to its twin in the reference, and to the golden stages."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_reference import fixup, maps, pack, refine, replicate, replicate_waterfill
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.fixup import move_replicas
from eplb_triton.kernels.maps import physical_maps
from eplb_triton.kernels.measure import measure_rows
from eplb_triton.kernels.pack import pack_plain, pack_spread
from eplb_triton.kernels.refine import corner_gpu_steps, refine_corner, refine_nearest, refine_peak
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
from eplb_triton.kernels.specs import launch_plan
from tests.cases import FAMILIES, loads, stage_arrays, stage_groups
from tests.comparing import assert_each_same, assert_same, assert_same_maps
from tests.sizes import chosen

PICKS = {
    "dhondt": replicate.pick_dhondt,
    "sainte_lague": replicate.pick_sainte_lague,
    "peak_aware": replicate.pick_peak_aware,
    "gated": replicate.pick_gated,
}
CHOSEN = chosen(FAMILIES, "continuous", "ties")


@triton.jit
def _pick(
    weights_ptr,
    counts_ptr,
    expert_ptr,
    rank_ptr,
    floats_ptr,
    ints_ptr,
    START: tl.constexpr,
    STOP: tl.constexpr,
    RULE: tl.constexpr,
    NUM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    counts = tl.load(counts_ptr + row * NUM + lane, mask=lane < NUM, other=1)
    weights = weights_ptr + row * NUM
    expert = expert_ptr + row * STOP
    rank = rank_ptr + row * STOP
    offsets = ints_ptr if AT_ONCE else None
    if RULE == "dhondt":
        counts = pick_dhondt(weights, counts, expert, rank, START, STOP, offsets, NUM, 32, 64)
    elif RULE == "sainte_lague":
        counts = pick_sainte_lague(weights, counts, expert, rank, START, STOP, NUM, 32)
    elif RULE == "peak_aware":
        counts = pick_peak_aware(weights, counts, expert, rank, START, STOP, NUM, 32)
    else:
        counts = pick_gated(weights, counts, expert, rank, START, STOP, floats_ptr, NUM, 32)
    tl.store(counts_ptr + row * NUM + lane, counts, mask=lane < NUM)


def _picked(rule: str, weight: Tensor, counts: Tensor, start: int, stop: int, at_once: bool) -> tuple[Tensor, ...]:
    rows, num = weight.shape
    got = counts.to(torch.int32), *(torch.full((rows, stop), -7, dtype=torch.int32) for _ in range(2))
    scratch = torch.full((64,), torch.nan), torch.full((64,), -7, dtype=torch.int32)
    _pick[(rows,)](weight, *got, *scratch, START=start, STOP=stop, RULE=rule, NUM=num, AT_ONCE=at_once)
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
        work = plan.workspace(layers, "cpu")
        kernel = plan.kernels[0]
        assert kernel.function is measure_rows
        kernel.function[plan.grid(layers)](weight, experts, 1, layers, *work, plan.partitions, **kernel.constexprs)
        redundant = replicas - experts
        assert _tail(rule, redundant, work.statistics) == reference(weight, redundant)


@triton.jit
def _waterfill(weights_ptr, counts_ptr, expert_ptr, rank_ptr, ints_ptr, NUM_REPLICAS: tl.constexpr, NUM: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    counts = waterfill_counts(weights_ptr + row * NUM, NUM_REPLICAS, NUM, 32)
    tl.store(counts_ptr + row * NUM + lane, counts, mask=lane < NUM)
    first = row * NUM_REPLICAS
    list_by_expert(counts, expert_ptr + first, rank_ptr + first, ints_ptr, NUM_REPLICAS, NUM, 32, 64)


@pytest.mark.parametrize("family", CHOSEN)
def test_waterfill(family: str) -> None:
    for num, replicas in ((1, 5), (6, 6), (7, 28), (20, 36), (32, 50)):
        weight = loads(family, replicas, 2, num)
        got = torch.full((2, num), -7, dtype=torch.int32), *torch.full((2, 2, replicas), -7, dtype=torch.int32)
        scratch = torch.full((64,), -7, dtype=torch.int32)
        _waterfill[(2,)](weight, *got, scratch, NUM_REPLICAS=replicas, NUM=num)
        counts = replicate_waterfill.waterfill_counts(weight, replicas)
        want = counts, *replicate_waterfill.list_by_expert(counts)
        assert_each_same(map(Tensor.long, got), want, "counts", "expert", "rank")


@triton.jit
def _move(
    weights_ptr,
    counts_ptr,
    expert_ptr,
    rank_ptr,
    MOVES: tl.constexpr,
    DONORS: tl.constexpr,
    PEAK: tl.constexpr,
    TIE: tl.constexpr,
    NUM: tl.constexpr,
    NUM_REPLICAS: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    counts = tl.load(counts_ptr + row * NUM + lane, mask=lane < NUM, other=0)
    expert = expert_ptr + row * NUM_REPLICAS if expert_ptr is not None else None
    rank = rank_ptr + row * NUM_REPLICAS if rank_ptr is not None else None
    counts = move_replicas(
        weights_ptr + row * NUM, counts, expert, rank, MOVES, DONORS, PEAK, TIE, NUM, NUM_REPLICAS, 32, 64
    )
    tl.store(counts_ptr + row * NUM + lane, counts, mask=lane < NUM)


@pytest.mark.parametrize("group", stage_groups("fixup"))
def test_golden_fixups(group: str) -> None:
    _, moves, donors, peak, tie = group.removeprefix("fixup/").split(" ")
    states = stage_arrays(group)
    counts = states["counts"].to(torch.int32)
    rows, num = counts.shape
    _move[(rows,)](
        states["weight"],
        counts,
        None,
        None,
        MOVES=int(moves),
        DONORS=donors,
        PEAK=peak,
        TIE=tie,
        NUM=num,
        NUM_REPLICAS=0,
    )
    assert_same(counts.to(torch.int64), states["after"], "counts")


@pytest.mark.parametrize("tie", ["first", "second_peak", "lexicographic"])
@pytest.mark.parametrize("donors", ["top", "replicated"])
@pytest.mark.parametrize("peak", ["second", "others", "exact"])
def test_fixups_of_the_list(peak: str, donors: str, tie: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for num in (2, 3, 9):
        counts = torch.randint(1, 4, (12, num), generator=generator)
        counts[:, 0] += 30 - counts.sum(1)
        weight = torch.randint(0, 60, (12, num), generator=generator).to(torch.float32)
        expert, rank = replicate_waterfill.list_by_expert(counts)
        got = counts.to(torch.int32), expert.to(torch.int32), rank.to(torch.int32)
        _move[(12,)](weight, *got, MOVES=3, DONORS=donors, PEAK=peak, TIE=tie, NUM=num, NUM_REPLICAS=30)
        fixup.move_replicas(weight, counts, expert, rank, 3, donors, peak, tie)  # type: ignore[arg-type]
        assert_each_same(map(Tensor.long, got), (counts, expert, rank), "counts", "expert", "rank")


@triton.jit
def _pack(
    loads_ptr,
    labels_ptr,
    item_at_ptr,
    longs_ptr,
    ints_ptr,
    NUM: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    RULE: tl.constexpr,
):
    first = tl.program_id(0) * NUM
    if RULE == "spread":
        pack_spread(
            loads_ptr + first, labels_ptr + first, item_at_ptr + first, longs_ptr, ints_ptr, NUM, NUM_PACKS, 64, 32
        )
    else:
        pack_plain(loads_ptr + first, item_at_ptr + first, longs_ptr, NUM, NUM_PACKS, 64, 32, RULE == "rounds")


def _item_at(pack_of: Tensor, slot: Tensor, num_packs: int) -> Tensor:
    place = pack_of * (pack_of.shape[1] // num_packs) + slot
    return torch.empty_like(place).scatter_(1, place, torch.arange(place.shape[1]).expand_as(place))


def _packed(rule: str, weight: Tensor, labels: Tensor, num_packs: int) -> Tensor:
    rows, num = weight.shape
    got = torch.full((rows, num), -7, dtype=torch.int32)
    scratch = torch.full((128,), -7), torch.full((64,), -7, dtype=torch.int32)
    _pack[(rows,)](weight, labels.to(torch.int32), got, *scratch, NUM=num, NUM_PACKS=num_packs, RULE=rule)
    return got.to(torch.int64)


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("rule", ["plain", "rounds", "spread"])
def test_pack(rule: str, family: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for num, num_packs in ((5, 1), (6, 6), (12, 3), (30, 5), (48, 24)):
        weight = loads(family, num, 2, num)
        labels = torch.randint(0, 4, weight.shape, generator=generator)
        twin = pack.pack_spread(weight, labels, num_packs) if rule == "spread" else pack.pack_plain(weight, num_packs)
        assert_same(_packed(rule, weight, labels, num_packs), _item_at(*twin, num_packs), "item at each slot")


@pytest.mark.parametrize("group", stage_groups("spread"))
def test_golden_spreads(group: str) -> None:
    num_packs = int(group.removeprefix("spread/"))
    states = stage_arrays(group)
    got = _packed("spread", states["weight"], states["labels"], num_packs)
    assert_same(got, _item_at(states["pack"], states["slot"], num_packs), "item at each slot")


@triton.jit
def _refine(
    loads_ptr,
    labels_ptr,
    item_at_ptr,
    doubles_ptr,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    LIGHTS: tl.constexpr,
    NUM: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    GPU_STAGE: tl.constexpr,
):
    first = tl.program_id(0) * NUM
    load = loads_ptr + first
    item_at = item_at_ptr + first
    if RULE == "nearest":
        refine_nearest(load, item_at, NUM_PACKS, STEPS, LIGHTS, NUM, 32)
    elif RULE == "corner":
        if GPU_STAGE:
            steps = corner_gpu_steps(load, item_at, doubles_ptr, NUM_PACKS, STEPS, NUM, 32)
            refine_corner(load, item_at, doubles_ptr, NUM_PACKS, steps, NUM, 32, 32)
        else:
            refine_corner(load, item_at, doubles_ptr, NUM_PACKS, STEPS, NUM, 32, 32)
    else:
        refine_peak(load, labels_ptr + first, item_at, NUM_PACKS, NUM, 32, 32)


def _refined(
    rule: str, steps: int, lights: int, weight: Tensor, labels: Tensor, item_at: Tensor, packs: int, gpu_stage: bool
) -> Tensor:
    rows, num = weight.shape
    got = item_at.to(torch.int32)
    _refine[(rows,)](
        weight,
        labels.to(torch.int32),
        got,
        torch.full((64,), torch.nan, dtype=torch.float64),
        RULE=rule,
        STEPS=steps,
        LIGHTS=lights,
        NUM=num,
        NUM_PACKS=packs,
        GPU_STAGE=gpu_stage,
    )
    return got.to(torch.int64)


@pytest.mark.parametrize("group", stage_groups("refine"))
def test_golden_refinements(group: str) -> None:
    num_packs, rule, steps, lights = [*group.removeprefix("refine/").split(" "), "0", "0"][:4]
    states = stage_arrays(group)
    packs = int(num_packs)
    before = _item_at(states["pack"], states["slot"], packs)
    got = _refined(rule, int(steps), int(lights), states["weight"], states["labels"], before, packs, False)
    assert_same(got, _item_at(states["pack_after"], states["slot_after"], packs), "item at each slot")


@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("rule", ["nearest", "corner", "peak"])
def test_refine(rule: str, family: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for num, packs in ((6, 6), (6, 1), (8, 2), (12, 3), (30, 5), (32, 16), (36, 2)):
        weight = loads(family, num, 2, num)
        labels = torch.randint(0, 4, weight.shape, generator=generator)
        place = torch.stack([torch.randperm(num, generator=generator) for _ in range(2)])
        state = place // (num // packs), place % (num // packs)
        if rule == "nearest":
            twin = refine.refine_nearest(weight, *state, packs, 3, 2)
        elif rule == "corner":
            twin = refine.refine_corner(weight, *state, packs, refine.corner_gpu_steps(weight, *state, packs, 2))
        else:
            twin = refine.refine_peak(weight, labels, *state, packs)
        got = _refined(rule, 2 if rule == "corner" else 3, 2, weight, labels, _item_at(*state, packs), packs, True)
        assert_same(got, _item_at(*twin, packs), "item at each slot")


@triton.jit
def _maps(
    item_at_ptr,
    expert_ptr,
    rank_ptr,
    row_counts_ptr,
    logical_ptr,
    phy2log_ptr,
    phyrank_ptr,
    logcnt_ptr,
    log2phy_ptr,
    NUM: tl.constexpr,
    NUM_REPLICAS: tl.constexpr,
    MOST: tl.constexpr,
):
    node = tl.program_id(0)
    first = node * NUM_REPLICAS
    physical_maps(
        item_at_ptr + first,
        expert_ptr + first,
        rank_ptr + first,
        row_counts_ptr + node * NUM,
        logical_ptr + node * NUM,
        first,
        phy2log_ptr,
        phyrank_ptr,
        logcnt_ptr,
        log2phy_ptr,
        NUM,
        NUM_REPLICAS,
        MOST,
        32,
        32,
        16,
    )


def test_maps() -> None:
    topology = Topology(
        num_replicas=24, num_gpus=6, num_groups=2, num_nodes=2
    )  # two rows of 7 experts and 12 replicas, 4 to a GPU
    counts = torch.tensor([[1, 3, 1, 2, 1, 1, 3], [6, 1, 1, 1, 1, 1, 1]])
    expert, rank = replicate_waterfill.list_by_expert(counts)
    logical = torch.tensor([[7, 8, 9, 10, 11, 12, 13], [0, 1, 2, 3, 4, 5, 6]])
    generator = torch.Generator().manual_seed(4)
    place = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)])
    twin = maps.physical_maps(place // 4, place % 4, logical.gather(1, expert), rank, 14, topology)
    got = [torch.full(shape, -7) for shape in ((24,), (24,), (14,), (14, 11))]
    given = [tensor.to(torch.int32) for tensor in (_item_at(place // 4, place % 4, 3), expert, rank, counts, logical)]
    _maps[(2,)](*given, *got, NUM=7, NUM_REPLICAS=12, MOST=11)
    assert_same_maps(got[:3], [layers[0] for layers in twin])
    for logical_expert, slots in enumerate(got[3].tolist()):
        held = [(int(got[1][slot]), slot) for slot in range(24) if got[0][slot] == logical_expert]
        assert slots == [slot for _, slot in sorted(held)] + [-1] * (11 - len(held))
