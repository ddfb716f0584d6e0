"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.fixed import INDEX, LABEL_SHIFT, label_of
from eplb_triton.kernels.positions import rank_packs


@triton.jit
def fill_blocks(
    loads_ptr,  # int32 [NUM_ITEMS], fixed point, equal within a label
    labels_ptr,  # int32 [NUM_ITEMS], expert of each item
    item_at_ptr,  # int32 [NUM_ITEMS], out: item at pack * S + slot
    sorted_ptr,  # int64 [ITEMS], scratch
    position_ptr,  # int32 [NUM_PACKS], scratch
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
    pack = tl.arange(0, PACKS)
    inside = pack < NUM_PACKS
    total = tl.zeros((PACKS,), tl.int32)
    label = total  # that the pack got in the block before
    for block in tl.range(0, S):
        start = block * NUM_PACKS
        turn = pack
        if block > 0:
            turn = rank_packs(total, pack, position_ptr, NUM_PACKS)
            last = label_of(tl.load(sorted_ptr + start - 1))
            if label_of(tl.load(sorted_ptr + start)) == last:
                ours = label_of(tl.load(sorted_ptr + start + pack, mask=inside, other=0))
                continuing = tl.sum((inside & (ours == last)).to(tl.int32), 0)
                free = inside & (label != last)
                nth = rank_packs(tl.where(free, turn, NUM_PACKS), pack, position_ptr, NUM_PACKS)
                first = free & (nth < continuing)
                turn = rank_packs(tl.where(first, turn, turn + NUM_PACKS), pack, position_ptr, NUM_PACKS)
        mine = tl.load(sorted_ptr + start + turn, mask=inside, other=0)
        tl.store(item_at_ptr + pack * S + block, (mine & INDEX).to(tl.int32) ^ INDEX, mask=inside)
        total += (mine >> 32).to(tl.int32)
        label = label_of(mine)
    tl.debug_barrier()
