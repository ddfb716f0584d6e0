"""The state of an exchange: packs in position order, and what is at each place."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST
from eplb_triton.kernels.sorting import sort_descending

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
    keys_ptr,  # int64 [PACKS], scratch
    NUM_PACKS: tl.constexpr,
    LOOPED: tl.constexpr = False,  # as of `sort_descending`
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
        numbered = ~sort_descending(~tl.where(inside, numbered, 0x7FFFFFFFFFFFFFFF), keys_ptr, LOOPED)
        tl.store(scratch_ptr + (numbered & 0x7FFFFFFF), pack, mask=inside)
        tl.debug_barrier()
        position = tl.load(scratch_ptr + pack, mask=inside, other=0)
    tl.debug_barrier()
    return position


@triton.jit
def new_state(
    items,
    replicas,
    places,  # its loads and labels, out
    MARKED: tl.constexpr,
    shape: tl.constexpr,  # Replicating
):
    """Load and label at each place. MARKED, where at most MARKS labels have several items: a label becomes a bit of its
    own, or 0 if no other item has it."""
    NUM_LABELS: tl.constexpr = shape.num_experts
    NUM_ITEMS: tl.constexpr = shape.num_replicas
    if MARKED:
        label = tl.arange(0, shape.expert_lanes)
        shared = (tl.load(replicas.counts + label, mask=label < NUM_LABELS, other=0) > 1).to(tl.int32)
        before = tl.minimum(tl.cumsum(shared, 0) - shared, MARKS - 1)  # MARKS of them: after the last, none is shared
        tl.store(replicas.spare + label, shared << before, mask=label < NUM_LABELS)
        tl.debug_barrier()
    place = tl.arange(0, shape.replica_lanes)
    item = tl.load(places.item_at + place, mask=place < NUM_ITEMS, other=0)
    its_label = tl.load(items.labels + item, mask=place < NUM_ITEMS, other=0)
    if MARKED:
        its_label = tl.load(replicas.spare + its_label, mask=place < NUM_ITEMS, other=0)
    tl.store(
        places.load_at + place, tl.load(items.fixed + item, mask=place < NUM_ITEMS, other=0), mask=place < NUM_ITEMS
    )
    tl.store(places.label_at + place, its_label, mask=place < NUM_ITEMS)
    tl.debug_barrier()
