"""The kernel stages of `balanced` in the interpreter: equal to their twins in the reference."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_reference import (
    fixed,
    fixup_paired,
    groups_partition,
    pack_blocks,
    refine_exchange,
    replicate_capped,
    replicate_waterfill,
)
from eplb_reference.arith import per_replica
from eplb_triton.constants import MOST_PARTITIONS
from eplb_triton.kernels.buffers import Items, Places, Replicas
from eplb_triton.kernels.fixed import fixed_point, mean_target
from eplb_triton.kernels.fixup_paired import move_paired
from eplb_triton.kernels.groups_partition import pack_partition
from eplb_triton.kernels.pack_blocks import fill_blocks
from eplb_triton.kernels.positions import new_state
from eplb_triton.kernels.refine_exchange import refine_doubles, refine_match, refine_pairs
from eplb_triton.kernels.replicate_capped import capped_counts
from eplb_triton.kernels.shapes import Exchanging, Packing, Pairing, Partitioning, Replicating
from eplb_triton.partitions import all_partitions, num_partitions
from tests.cases import FAMILIES, loads
from tests.comparing import assert_same
from tests.sizes import chosen


@triton.jit
def _counts(loads_ptr, counts_ptr, spare_ptr, keys_ptr, shape: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    NUM: tl.constexpr = shape.num_experts
    replicas = Replicas(loads_ptr + row * NUM, None, None, None, None, None, spare_ptr, keys_ptr)
    tl.store(counts_ptr + row * NUM + lane, capped_counts(replicas, shape), mask=lane < NUM)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("family", chosen(FAMILIES, "continuous", "ties", "zeros"))
def test_capped_counts(family: str, at_once: bool) -> None:
    for num, replicas, packs in ((1, 4, 4), (7, 15, 3), (20, 26, 2), (5, 40, 4), (6, 6, 1)):
        weight = loads(family, num, 3, num)
        got = torch.full(weight.shape, -7, dtype=torch.int32)
        scratch = torch.full((32,), -7, dtype=torch.int32), torch.full((64,), -7)
        _counts[(3,)](weight, got, *scratch, shape=Replicating(num, replicas, packs, 32, 64, 64, at_once))
        assert_same(got.to(torch.int64), replicate_capped.capped_counts(weight, replicas, packs), "counts")


@triton.jit
def _paired(loads_ptr, counts_ptr, spare_ptr, keys_ptr, rule: tl.constexpr, shape: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, 32)
    NUM: tl.constexpr = shape.num_experts
    counts = tl.load(counts_ptr + row * NUM + lane, mask=lane < NUM, other=0)
    replicas = Replicas(loads_ptr + row * NUM, None, None, None, None, None, spare_ptr, keys_ptr)
    counts = move_paired(replicas, counts, rule, shape)
    tl.store(counts_ptr + row * NUM + lane, counts, mask=lane < NUM)


@pytest.mark.parametrize("family", chosen(FAMILIES, "ties", "outlier"))
def test_move_paired(family: str) -> None:
    for num, packs, moves, donors in ((20, 16, 2, 4), (7, 6, 3, 2), (1, 3, 1, 4)):
        weight = loads(family, num, 2, num)
        counts = replicate_capped.capped_counts(weight, 2 * packs, packs)
        got = counts.to(torch.int32)
        scratch = torch.full((64,), -7, dtype=torch.int32), torch.full((64,), -7)
        shape = Replicating(num, 2 * packs, packs, 32, 64, 64, False)
        _paired[(2,)](weight, got, *scratch, rule=Pairing(moves, donors), shape=shape)
        fixup_paired.move_paired(weight, counts, packs, moves, donors)
        assert_same(got.to(torch.int64), counts, "counts")


@triton.jit
def _partition(
    loads_ptr, out_ptr, table_ptr, ints_ptr, longs_ptr, result_ptr, shape: tl.constexpr, partition: tl.constexpr
):
    row = tl.program_id(0)
    first = row * shape.num_items
    items = Items(loads_ptr + first, None, out_ptr + first, longs_ptr, longs_ptr + 72, ints_ptr, ints_ptr + 32, None)
    places = Places(
        items.item_at, ints_ptr + 64, ints_ptr + 96, ints_ptr + 128, ints_ptr + 160, ints_ptr + 192, longs_ptr + 72
    )
    heaviest, scale = pack_partition(items, places, table_ptr, shape, partition)
    tl.store(result_ptr + row * 2, heaviest.to(tl.int64))
    tl.store(result_ptr + row * 2 + 1, scale)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (8, 2), (5, 1), (4, 4), (12, 4)])
def test_pack_partition(family: str, groups: int, nodes: int) -> None:
    load = loads(family, groups * nodes, 2, groups)
    ways = num_partitions(groups, nodes)
    table = torch.tensor(all_partitions(groups, nodes) if ways <= MOST_PARTITIONS else [[0]], dtype=torch.int32)
    out, ints = torch.full((2, groups), -7, dtype=torch.int32), torch.full((224,), -7, dtype=torch.int32)
    result = torch.full((2, 2), -7)
    ways = ways if ways <= MOST_PARTITIONS else 0
    lanes = triton.next_power_of_2(max(32, ways))
    _partition[(2,)](
        load, out, table.flatten(), ints, torch.full((104,), -7), result, shape=Packing(groups, nodes, 32, 32, 32),
        partition=Partitioning(ways, lanes, Exchanging(0, 4 * groups, 1 if nodes > 1 else 0, 32, 0, 0, 32)),
    )  # fmt: skip
    pack, slot = groups_partition.pack_partition(load, nodes)
    items = torch.arange(groups).expand_as(pack)
    want = torch.empty_like(pack).scatter_(1, pack * (groups // nodes) + slot, items)
    assert_same(out.to(torch.int64), want, "group at each place")
    whole, scale = fixed.fixed_point(load, groups // nodes)
    heaviest = torch.zeros(2, nodes, dtype=torch.int64).scatter_add_(1, pack, whole.to(torch.int64)).amax(1)
    assert_same(result, torch.stack((heaviest, scale[:, 0]), 1), "heaviest load and scale")


@triton.jit
def _place(
    loads_ptr, labels_ptr, counts_ptr, ints_ptr, longs_ptr, out_ptr, scale_ptr, MARKED: tl.constexpr,
    exchange: tl.constexpr, experts: tl.constexpr, shape: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = row * shape.num_items
    ints = ints_ptr + row * (6 * 64)
    longs = longs_ptr + row * (2 * 64)
    spare = ints + 320
    items = Items(loads_ptr + first, labels_ptr + first, out_ptr + first, longs, longs + 64, ints, spare, None)
    places = Places(items.item_at, ints + 64, ints + 128, ints + 192, ints + 256, spare, longs + 64)
    replicas = Replicas(None, None, None, counts_ptr + row * experts.num_experts, None, None, spare, None)
    tl.store(scale_ptr + row, fixed_point(items.loads, items.fixed, shape))
    target = mean_target(items.fixed, shape)
    fill_blocks(items, shape)
    new_state(items, replicas, places, MARKED, experts)
    refine_pairs(places, target, exchange, MARKED, shape)
    refine_match(places, target, exchange, MARKED, shape)
    refine_doubles(places, target, exchange, MARKED, shape)


def _expected(load: Tensor, labels: Tensor, packs: int, steps: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Item at each place, and the scale, by the reference."""
    pair_rounds, match_rounds, proposers, double_steps, candidates = steps
    whole, scale = fixed.fixed_point(load, load.shape[1] // packs)
    target = fixed.mean_target(whole, packs)
    place = pack_blocks.fill_blocks(whole, labels, packs)
    place = refine_exchange.refine_pairs(whole, labels, *place, packs, target, pair_rounds)
    place = refine_exchange.refine_match(whole, labels, *place, packs, target, match_rounds, proposers)
    pack, slot = refine_exchange.refine_doubles(whole, labels, *place, packs, target, double_steps, candidates)
    items = torch.arange(load.shape[1]).expand_as(pack)
    return torch.empty_like(pack).scatter_(1, pack * (load.shape[1] // packs) + slot, items), scale


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("family", chosen(["continuous", "ties", "zeros", "outlier", "denormal"], "ties"))
@pytest.mark.parametrize(
    ("experts", "replicas", "packs", "steps"),
    [
        (20, 32, 8, (0, 0, 1, 0, 0)),
        (20, 32, 8, (3, 0, 1, 0, 0)),
        (20, 32, 8, (1, 4, 3, 0, 0)),
        (20, 30, 5, (1, 2, 1, 4, 500)),
        (9, 20, 5, (1, 2, 3, 4, 500)),
        (3, 24, 4, (2, 2, 2, 2, 2048)),  # the cap is lifted
        (12, 18, 9, (1, 2, 2, 1, 64)),
        (6, 8, 8, (2, 2, 2, 2, 64)),
        (6, 8, 1, (2, 2, 2, 2, 5000)),
    ],
)
def test_from_counts_to_places(
    family: str, marked: bool, experts: int, replicas: int, packs: int, steps: tuple[int, int, int, int, int]
) -> None:
    rows = 2
    weight = loads(family, replicas + packs, rows, experts)
    counts = replicate_capped.capped_counts(weight, replicas, packs)
    labels, _ = replicate_waterfill.list_by_expert(counts)
    load = per_replica(weight, counts).gather(1, labels)
    slots = replicas // packs
    pairs = slots * (slots - 1) // 2
    partners = min(packs - 1, steps[4] // (pairs * pairs)) if pairs else 0
    proposers = min(max(steps[2], packs // 8), packs // 2)
    out = torch.full((rows, replicas), -7, dtype=torch.int32)
    scale = torch.full((rows,), -7, dtype=torch.int64)
    ints, longs = torch.full((rows, 6 * 64), -7, dtype=torch.int32), torch.full((rows, 2 * 64), -7, dtype=torch.int64)
    candidate_lanes = triton.next_power_of_2(max(32, partners * pairs))
    _place[(rows,)](
        load, labels.to(torch.int32), counts.to(torch.int32), ints, longs, out, scale, MARKED=marked,
        exchange=Exchanging(steps[0], steps[1], proposers, 64, steps[3], partners, candidate_lanes),
        experts=Replicating(experts, replicas, packs, 32, 64, 64, False), shape=Packing(replicas, packs, 64, 32, 32),
    )  # fmt: skip
    want, want_scale = _expected(load, labels, packs, steps)
    assert_same(scale, want_scale[:, 0], "scale")
    assert_same(out.to(torch.int64), want, "item at each slot")
