"""Partition: groups onto nodes so that the heaviest node is as light as it can be."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, smallest
from eplb_triton.kernels.fixed import fixed_point
from eplb_triton.kernels.pack import pack_plain
from eplb_triton.kernels.refine_exchange import refine_match

EXCHANGES_PER_ITEM = tl.constexpr(4)


@triton.jit
def pack_partition(
    loads_ptr,  # float32 [NUM_ITEMS]
    item_at_ptr,  # int32 [NUM_ITEMS], out
    table_ptr,  # int32 [WAYS, NUM_ITEMS], the items of all packs of every partition in order
    fixed_ptr,  # int32 [NUM_ITEMS], scratch
    state_ptr,  # int32 [5, ITEMS], scratch
    sorted_ptr,  # int64 [ITEMS + 40], scratch
    NUM_ITEMS: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
    WAYS: tl.constexpr,  # 0: too many to try
    WAY_LANES: tl.constexpr,  # a power of two, at least WAYS
    PROPOSERS: tl.constexpr,
    MEETINGS: tl.constexpr,
):
    """The partition whose heaviest pack is lightest, in fixed point; with no table `pack_plain`, then the best exchange
    with the heaviest pack until none gains. Returns the heaviest pack's load, int32, and the scale, int64.
    Ties: the first partition."""
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    scale = fixed_point(loads_ptr, fixed_ptr, S, NUM_ITEMS, ITEMS)
    item = tl.arange(0, ITEMS)
    if WAYS > 0:
        way = tl.arange(0, WAY_LANES)
        heaviest = tl.zeros((WAY_LANES,), tl.int32)
        for q in tl.range(0, NUM_PACKS):
            load = tl.zeros((WAY_LANES,), tl.int32)
            for k in tl.range(0, S):
                its_item = tl.load(table_ptr + way * NUM_ITEMS + q * S + k, mask=way < WAYS, other=0)
                load += tl.load(fixed_ptr + its_item, mask=way < WAYS, other=0)
            heaviest = tl.maximum(heaviest, load)
        least, best = smallest(tl.where(way < WAYS, heaviest, HIGHEST), way)
        chosen = tl.load(table_ptr + best * NUM_ITEMS + item, mask=item < NUM_ITEMS, other=0)
        tl.store(item_at_ptr + item, chosen, mask=item < NUM_ITEMS)
    else:
        load_at, label_at, order = state_ptr, state_ptr + ITEMS, state_ptr + 2 * ITEMS
        height, spare = state_ptr + 3 * ITEMS, state_ptr + 4 * ITEMS
        pack_plain(loads_ptr, item_at_ptr, sorted_ptr, NUM_ITEMS, NUM_PACKS, ITEMS, PACKS, False)
        tl.debug_barrier()
        placed = tl.load(item_at_ptr + item, mask=item < NUM_ITEMS, other=0)
        load_of_placed = tl.load(fixed_ptr + placed, mask=item < NUM_ITEMS, other=0)
        tl.store(load_at + item, load_of_placed, mask=item < NUM_ITEMS)
        tl.store(label_at + item, tl.zeros_like(item), mask=item < NUM_ITEMS)  # no two items share a label
        tl.debug_barrier()
        rounds: tl.constexpr = EXCHANGES_PER_ITEM * NUM_ITEMS
        refine_match(
            item_at_ptr, load_at, label_at, order, height, spare, NUM_PACKS, 0, rounds, PROPOSERS, NUM_ITEMS,
            PACKS, MEETINGS, True,
        )  # fmt: skip
        pack = tl.arange(0, PACKS)
        load = tl.zeros((PACKS,), tl.int32)
        for k in tl.range(0, S):
            load += tl.load(load_at + pack * S + k, mask=pack < NUM_PACKS, other=0)
        least = tl.max(load, 0)
    tl.debug_barrier()
    return least, scale
