"""Partition: groups onto nodes so that the heaviest node is as light as it can be."""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, smallest
from eplb_triton.kernels.fixed import fixed_point
from eplb_triton.kernels.pack import pack_plain
from eplb_triton.kernels.refine_exchange import refine_match


@triton.jit
def pack_partition(
    items,
    places,  # Places, scratch
    table_ptr,  # int32 [ways, num_items], the items of all packs of every partition in order
    shape: tl.constexpr,  # Packing
    partition: tl.constexpr,  # Partitioning
):
    """The partition whose heaviest pack is lightest, in fixed point; with no table `pack_plain`, then the best exchange
    with the heaviest pack until none gains. Returns the heaviest pack's load, int32, and the scale, int64.
    Ties: the first partition."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    NUM_PACKS: tl.constexpr = shape.num_packs
    WAYS: tl.constexpr = partition.ways
    WAY_LANES: tl.constexpr = partition.way_lanes
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    scale = fixed_point(items.loads, items.fixed, shape)
    item = tl.arange(0, shape.item_lanes)
    if WAYS > 0:
        way = tl.arange(0, WAY_LANES)
        heaviest = tl.zeros((WAY_LANES,), tl.int32)
        for q in tl.range(0, NUM_PACKS):
            load = tl.zeros((WAY_LANES,), tl.int32)
            for k in tl.range(0, S):
                its_item = tl.load(table_ptr + way * NUM_ITEMS + q * S + k, mask=way < WAYS, other=0)
                load += tl.load(items.fixed + its_item, mask=way < WAYS, other=0)
            heaviest = tl.maximum(heaviest, load)
        least, best = smallest(tl.where(way < WAYS, heaviest, HIGHEST), way)
        chosen = tl.load(table_ptr + best * NUM_ITEMS + item, mask=item < NUM_ITEMS, other=0)
        tl.store(items.item_at + item, chosen, mask=item < NUM_ITEMS)
    else:
        pack_plain(items, shape)
        tl.debug_barrier()
        placed = tl.load(items.item_at + item, mask=item < NUM_ITEMS, other=0)
        load_of_placed = tl.load(items.fixed + placed, mask=item < NUM_ITEMS, other=0)
        tl.store(places.load_at + item, load_of_placed, mask=item < NUM_ITEMS)
        tl.store(places.label_at + item, tl.zeros_like(item), mask=item < NUM_ITEMS)  # no two items share a label
        tl.debug_barrier()
        exchange: tl.constexpr = partition.exchange
        refine_match(places, 0, exchange, True, shape)
        pack = tl.arange(0, shape.pack_lanes)
        load = tl.zeros_like(pack)
        for k in tl.range(0, S):
            load += tl.load(places.load_at + pack * S + k, mask=pack < NUM_PACKS, other=0)
        least = tl.max(load, 0)
    tl.debug_barrier()
    return least, scale
