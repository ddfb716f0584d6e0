"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.fixed import INDEX, LABEL_SHIFT, label_of
from eplb_triton.kernels.positions import rank_packs
from eplb_triton.kernels.sorting import sort_descending


@triton.jit
def fill_blocks(
    items,  # Items; their loads in fixed point are equal within a label
    shape: tl.constexpr,  # Packing
):
    """The next NUM_PACKS heaviest items at a time, the heaviest to the lightest pack; items that continue the last
    label of the block before go to the first packs that did not get it there. Ties: the lower label, item, pack."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    NUM_PACKS: tl.constexpr = shape.num_packs
    tl.static_assert(NUM_ITEMS <= 65536, "a sort key has 16 bits for an item")
    LOOPED: tl.constexpr = shape.looped_sorts
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    item = tl.arange(0, shape.item_lanes)
    load = tl.load(items.fixed + item, mask=item < NUM_ITEMS, other=0)
    label = tl.load(items.labels + item, mask=item < NUM_ITEMS, other=0)
    item_key = (load.to(tl.int64) << 32) | ((label ^ INDEX) << LABEL_SHIFT).to(tl.uint32).to(tl.int64) | (item ^ INDEX)
    item_key = sort_descending(tl.where(item < NUM_ITEMS, item_key, -1), items.sorted, LOOPED)
    tl.store(items.sorted + item, item_key)
    tl.debug_barrier()
    pack = tl.arange(0, shape.pack_lanes)
    inside = pack < NUM_PACKS
    total = tl.zeros_like(pack)
    label = total  # that the pack got in the block before
    for block in tl.range(0, S):
        start = block * NUM_PACKS
        turn = pack
        if block > 0:
            turn = rank_packs(total, pack, items.spare, items.keys, NUM_PACKS, LOOPED)
            last = label_of(tl.load(items.sorted + start - 1))
            if label_of(tl.load(items.sorted + start)) == last:
                ours = label_of(tl.load(items.sorted + start + pack, mask=inside, other=0))
                continuing = tl.sum((inside & (ours == last)).to(tl.int32), 0)
                free = inside & (label != last)
                nth = rank_packs(tl.where(free, turn, NUM_PACKS), pack, items.spare, items.keys, NUM_PACKS, LOOPED)
                first = free & (nth < continuing)
                turn = rank_packs(
                    tl.where(first, turn, turn + NUM_PACKS), pack, items.spare, items.keys, NUM_PACKS, LOOPED
                )
        mine = tl.load(items.sorted + start + turn, mask=inside, other=0)
        tl.store(items.item_at + pack * S + block, (mine & INDEX).to(tl.int32) ^ INDEX, mask=inside)
        total += (mine >> 32).to(tl.int32)
        label = label_of(mine)
    tl.debug_barrier()
