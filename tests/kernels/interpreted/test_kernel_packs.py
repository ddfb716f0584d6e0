"""Packing, swaps and maps, each alone in the interpreter: equal to the twins in the reference and to golden stages."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_reference import maps, pack, refine, replicate_waterfill
from eplb_triton import Topology
from eplb_triton.kernels.buffers import Items, Maps, Replicas
from eplb_triton.kernels.maps import physical_maps
from eplb_triton.kernels.pack import pack_plain, pack_spread
from eplb_triton.kernels.refine import corner_gpu_steps, refine_corner, refine_nearest, refine_peak
from eplb_triton.kernels.shapes import Packing, Refining
from tests.cases import loads, stage_arrays, stage_groups
from tests.comparing import assert_same, assert_same_maps
from tests.kernels.interpreted.stage_tools import CHOSEN, replicating, scratch
from tests.sizes import chosen

REFINEMENTS = stage_groups("refine")


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
    longs, ints = scratch(128, torch.int64), scratch(64, torch.int32)
    doubles = scratch(64, torch.float64)
    return Items(weight, labels.to(torch.int32), item_at, longs, scratch(64, torch.int64), None, ints, doubles)


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
        _maps[(2,)](given[0], replicas, got, WIDTH=width, shape=replicating(7, 12))
        assert_same_maps(got[:3], [layers[0] for layers in twin])
        for logical_expert, slots in enumerate(got.log2phy.tolist()):
            held = [(int(got.phyrank[slot]), slot) for slot in range(24) if got.phy2log[slot] == logical_expert]
            kept = [slot for _, slot in sorted(held)][:width]
            assert slots == kept + [-1] * (width - len(kept)) + [-7] * (16 - width)
        assert got.bad.tolist() == ([5, -2] if width == 3 else [5, -1])


def _bad() -> Tensor:
    """A bad load in the first row, none in the second: the expert that has too many replicas is in the second."""
    return torch.tensor([5, -1], dtype=torch.int32)
