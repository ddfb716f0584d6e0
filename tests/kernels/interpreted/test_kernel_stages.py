"""Every kernel stage alone, in the interpreter: equal to its twin in the reference, and to the golden stages."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_reference import fixup, maps, pack, refine, replicate, replicate_waterfill
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.buffers import Items, Maps, Replicas
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
from eplb_triton.kernels.shapes import Moving, Packing, Refining, Replicating
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
REFINEMENTS = stage_groups("refine")


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


def _replicating(num: int, num_replicas: int, at_once: bool = False) -> Replicating:
    return Replicating(num, num_replicas, 1, 32, 64, 64, at_once)


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), torch.nan if dtype.is_floating_point else -7, dtype=dtype)


def _replicas(weight: Tensor, counts: Tensor, expert: Tensor | None, rank: Tensor | None) -> Replicas:
    scratch = _scratch(64, torch.float32), _scratch(64, torch.int32), _scratch(64, torch.int64)
    return Replicas(weight, expert, rank, counts, None, *scratch)


def _picked(rule: str, weight: Tensor, counts: Tensor, start: int, stop: int, at_once: bool) -> tuple[Tensor, ...]:
    rows, num = weight.shape
    got = counts.to(torch.int32), *(torch.full((rows, stop), -7, dtype=torch.int32) for _ in range(2))
    _pick[(rows,)](_replicas(weight, *got), START=start, STOP=stop, RULE=rule, shape=_replicating(num, stop, at_once))
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
        _waterfill[(2,)](_replicas(weight, *got), shape=_replicating(num, replicas))
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
    _move[(rows,)](_replicas(states["weight"], counts, None, None), rule=rule, shape=_replicating(num, 0))
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
        _move[(12,)](_replicas(weight, *got), rule=Moving(3, donors, peak, tie), shape=_replicating(num, 30))
        fixup.move_replicas(weight, counts, expert, rank, 3, donors, peak, tie)  # type: ignore[arg-type]
        assert_each_same(map(Tensor.long, got), (counts, expert, rank), "counts", "expert", "rank")


@triton.jit
def _pack(given, RULE: tl.constexpr, shape: tl.constexpr):
    first = tl.program_id(0) * shape.num_items
    items = Items(
        given.loads + first,
        given.labels + first,
        given.item_at + first,
        given.sorted,
        given.keys,
        None,
        given.spare,
        None,
    )
    if RULE == "spread":
        pack_spread(items, shape)
    else:
        pack_plain(items, shape)


def _items(weight: Tensor, labels: Tensor, item_at: Tensor) -> Items:
    longs, ints = _scratch(128, torch.int64), _scratch(64, torch.int32)
    doubles = _scratch(64, torch.float64)
    return Items(weight, labels.to(torch.int32), item_at, longs, _scratch(64, torch.int64), None, ints, doubles)


def _item_at(pack_of: Tensor, slot: Tensor, num_packs: int) -> Tensor:
    place = pack_of * (pack_of.shape[1] // num_packs) + slot
    return torch.empty_like(place).scatter_(1, place, torch.arange(place.shape[1]).expand_as(place))


def _packed(rule: str, weight: Tensor, labels: Tensor, num_packs: int) -> Tensor:
    rows, num = weight.shape
    got = torch.full((rows, num), -7, dtype=torch.int32)
    shape = Packing(num, num_packs, 64, 32, 32, rule == "rounds")
    _pack[(rows,)](_items(weight, labels, got), RULE=rule, shape=shape)
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


@pytest.mark.parametrize("group", chosen(stage_groups("spread"), "spread/4"))
def test_golden_spreads(group: str) -> None:
    num_packs = int(group.removeprefix("spread/"))
    states = stage_arrays(group)
    got = _packed("spread", states["weight"], states["labels"], num_packs)
    assert_same(got, _item_at(states["pack"], states["slot"], num_packs), "item at each slot")


@triton.jit
def _refine(given, GPU_STAGE: tl.constexpr, rule: tl.constexpr, shape: tl.constexpr):
    first = tl.program_id(0) * shape.num_items
    items = Items(
        given.loads + first, given.labels + first, given.item_at + first, None, None, None, None, given.pack_loads
    )
    if rule.rule == "nearest":
        refine_nearest(items, rule, shape)
    elif rule.rule == "corner":
        if GPU_STAGE:
            refine_corner(items, corner_gpu_steps(items, rule, shape), shape)
        else:
            refine_corner(items, rule.steps, shape)
    else:
        refine_peak(items, shape)


def _refined(rule: Refining, weight: Tensor, labels: Tensor, item_at: Tensor, packs: int, *, gpu_stage: bool) -> Tensor:
    rows, num = weight.shape
    got = item_at.to(torch.int32)
    shape = Packing(num, packs, 64, 32, 32)
    _refine[(rows,)](_items(weight, labels, got), GPU_STAGE=gpu_stage, rule=rule, shape=shape)
    return got.to(torch.int64)


@pytest.mark.parametrize("group", chosen(REFINEMENTS, *(group for group in REFINEMENTS if "refine/3 " in group)))
def test_golden_refinements(group: str) -> None:
    num_packs, rule, steps, lights = [*group.removeprefix("refine/").split(" "), "0", "0"][:4]
    states = stage_arrays(group)
    packs = int(num_packs)
    before = _item_at(states["pack"], states["slot"], packs)
    refining = Refining(rule, int(steps), int(lights))  # type: ignore[arg-type]
    got = _refined(refining, states["weight"], states["labels"], before, packs, gpu_stage=False)
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
        refining = Refining(rule, 2 if rule == "corner" else 3, 2)  # type: ignore[arg-type]
        got = _refined(refining, weight, labels, _item_at(*state, packs), packs, gpu_stage=True)
        assert_same(got, _item_at(*twin, packs), "item at each slot")


@triton.jit
def _maps(item_at_ptr, given, maps, WIDTH: tl.constexpr, shape: tl.constexpr):
    node = tl.program_id(0)
    NUM: tl.constexpr = shape.num_experts
    first = node * shape.num_replicas
    replicas = Replicas(
        None, given.expert + first, given.rank + first, given.counts + node * NUM, given.logical + node * NUM, None,
        None, None,
    )  # fmt: skip
    of_row = Maps(maps.phy2log, maps.phyrank, maps.logcnt, maps.log2phy, maps.bad + node)
    physical_maps(item_at_ptr + first, replicas, first, of_row, 16, WIDTH, 16, shape)


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
    given = [tensor.to(torch.int32) for tensor in (_item_at(place // 4, place % 4, 3), expert, rank, counts, logical)]
    replicas = Replicas(None, given[1], given[2], given[3], given[4], None, None, None)
    for width in (11, 14, 3):  # as many as can be, more, and fewer than expert 0 has
        phy2log, phyrank, logcnt, log2phy = (torch.full(shape, -7) for shape in ((24,), (24,), (14,), (14, 16)))
        got = Maps(phy2log, phyrank, logcnt, log2phy, _bad())
        _maps[(2,)](given[0], replicas, got, WIDTH=width, shape=_replicating(7, 12))
        assert_same_maps(got[:3], [layers[0] for layers in twin])
        for logical_expert, slots in enumerate(got.log2phy.tolist()):
            held = [(int(got.phyrank[slot]), slot) for slot in range(24) if got.phy2log[slot] == logical_expert]
            kept = [slot for _, slot in sorted(held)][:width]
            assert slots == kept + [-1] * (width - len(kept)) + [-7] * (16 - width)
        assert got.bad.tolist() == ([5, -2] if width == 3 else [5, -1])


def _bad() -> Tensor:
    """A bad load in the first row, none in the second: the expert that has too many replicas is in the second."""
    return torch.tensor([5, -1], dtype=torch.int32)
