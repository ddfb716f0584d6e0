"""The state of an exchange: packs in position order, and what is at each place."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST

MARKS = tl.constexpr(32)
"""Labels of several items that bits of an int32 can stand for."""
COUNTED_UP_TO = tl.constexpr(32)
"""Packs: up to here all pairs are compared, which beats a sort and its shuffles (of 8 packs threefold); a tile of 64 by
64 would keep what it needs of its index for every round, in more registers than there are."""


@triton.jit
def rank_packs(
    keys,  # int32 [PACKS], below HIGHEST
    pack,  # int32 [PACKS], tl.arange
    scratch_ptr,  # int32 [NUM_PACKS]
    NUM_PACKS: tl.constexpr,
):
    """The position [PACKS] of each pack in the order of (key ascending, number ascending); what earlier stores left in
    memory is seen by all lanes afterwards."""
    PACKS: tl.constexpr = pack.shape[0]
    inside = pack < NUM_PACKS
    if NUM_PACKS <= COUNTED_UP_TO:
        tl.store(scratch_ptr + pack, keys, mask=inside)
        tl.debug_barrier()
        OTHERS: tl.constexpr = triton.next_power_of_2(NUM_PACKS)
        other, mine = tl.arange(0, OTHERS)[:, None], tl.arange(0, PACKS)[None, :]
        its_key = tl.load(scratch_ptr + other, mask=other < NUM_PACKS, other=HIGHEST)
        my_key = tl.load(scratch_ptr + mine, mask=mine < NUM_PACKS, other=0)
        position = tl.sum((its_key < my_key + (other < mine).to(tl.int32)).to(tl.int32), 0)
    else:
        numbered = (keys.to(tl.int64) << 32) | pack.to(tl.int64)
        numbered = tl.sort(tl.where(inside, numbered, 0x7FFFFFFFFFFFFFFF))
        tl.store(scratch_ptr + (numbered & 0x7FFFFFFF), pack, mask=inside)
        tl.debug_barrier()
        position = tl.load(scratch_ptr + pack, mask=inside, other=0)
    tl.debug_barrier()
    return position


@triton.jit
def new_state(
    loads_ptr,  # int32 [NUM_ITEMS], fixed point
    labels_ptr,  # int32 [NUM_ITEMS], expert of each item
    counts_ptr,  # int32 [NUM_LABELS], items of each label
    item_at_ptr,  # int32 [NUM_ITEMS]
    load_at_ptr,  # int32 [NUM_ITEMS], out
    label_at_ptr,  # int32 [NUM_ITEMS], out
    marks_ptr,  # int32 [NUM_LABELS], scratch
    NUM_LABELS: tl.constexpr,
    LABELS: tl.constexpr,
    NUM_ITEMS: tl.constexpr,
    ITEMS: tl.constexpr,
    MARKED: tl.constexpr,
):
    """Load and label at each place. MARKED, where at most MARKS labels have several items: a label becomes a bit of its
    own, or 0 if no other item has it."""
    if MARKED:
        label = tl.arange(0, LABELS)
        shared = (tl.load(counts_ptr + label, mask=label < NUM_LABELS, other=0) > 1).to(tl.int32)
        tl.store(marks_ptr + label, shared << (tl.cumsum(shared, 0) - shared), mask=label < NUM_LABELS)
        tl.debug_barrier()
    place = tl.arange(0, ITEMS)
    item = tl.load(item_at_ptr + place, mask=place < NUM_ITEMS, other=0)
    its_label = tl.load(labels_ptr + item, mask=place < NUM_ITEMS, other=0)
    if MARKED:
        its_label = tl.load(marks_ptr + its_label, mask=place < NUM_ITEMS, other=0)
    tl.store(load_at_ptr + place, tl.load(loads_ptr + item, mask=place < NUM_ITEMS, other=0), mask=place < NUM_ITEMS)
    tl.store(label_at_ptr + place, its_label, mask=place < NUM_ITEMS)
    tl.debug_barrier()
