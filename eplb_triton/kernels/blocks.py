"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.fixed import INDEX, LABEL_SHIFT, label_of


@triton.jit
def pack_blocks(
    loads_ptr,  # int32 [NUM_ITEMS], fixed point, equal within a label
    labels_ptr,  # int32 [NUM_ITEMS], expert of each item
    item_at_ptr,  # int32 [NUM_ITEMS], out: item at pack * S + slot
    sorted_ptr,  # int64 [ITEMS], scratch
    NUM_ITEMS: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """The next NUM_PACKS heaviest items at a time, the heaviest to the lightest pack; items that continue the last
    label of the block before go to the first packs that did not get it there. Ties: the lower label, item, pack."""
    tl.static_assert(NUM_ITEMS <= 65536, "a sort key has 16 bits for an item")
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    item = tl.arange(0, ITEMS)
    load = tl.load(loads_ptr + item, mask=item < NUM_ITEMS, other=0)
    label = tl.load(labels_ptr + item, mask=item < NUM_ITEMS, other=0)
    item_key = (load.to(tl.int64) << 32) | ((label ^ INDEX) << LABEL_SHIFT).to(tl.uint32).to(tl.int64) | (item ^ INDEX)
    item_key = tl.sort(tl.where(item < NUM_ITEMS, item_key, -1), descending=True)
    tl.store(sorted_ptr + item, item_key)
    tl.debug_barrier()
    position = tl.arange(0, PACKS)
    inside = position < NUM_PACKS
    total = tl.zeros((PACKS,), tl.int32)  # by position
    pack = position
    for block in tl.range(0, S):
        start = block * NUM_PACKS
        key = (total.to(tl.int64) << 32) | pack.to(tl.int64)
        key = tl.sort(tl.where(inside, key, 0x7FFFFFFFFFFFFFFF))
        total = (key >> 32).to(tl.int32)
        pack = (key & 0x7FFFFFFF).to(tl.int32)
        turn = position
        if block > 0:
            last = label_of(tl.load(sorted_ptr + start - 1))
            ours = label_of(tl.load(sorted_ptr + start + position, mask=inside, other=0))
            continuing = tl.sum((inside & (ours == last)).to(tl.int32), 0)
            before = tl.load(item_at_ptr + pack * S + block - 1, mask=inside, other=0)
            free = inside & (tl.load(labels_ptr + before, mask=inside, other=0) != last)
            first = free & (tl.cumsum(free.to(tl.int32), 0) <= continuing)
            ahead = tl.cumsum(first.to(tl.int32), 0)
            turn = tl.where(first, ahead - 1, tl.sum(first.to(tl.int32), 0) + position - ahead)
        mine = tl.load(sorted_ptr + start + turn, mask=inside, other=0)
        tl.store(item_at_ptr + pack * S + block, (mine & INDEX).to(tl.int32) ^ INDEX, mask=inside)
        total += (mine >> 32).to(tl.int32)
        tl.debug_barrier()
