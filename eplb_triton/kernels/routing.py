"""Routing: which physical slot each token of a step goes to, by the quotas of its experts.

A *place* is as in splitting.py. Where the quotas of an expert are all 0, each place counts as having 1. A program sorts
the slots of the layer by expert and keeps them in registers: no scratch, and no table that could be stale.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST
from eplb_triton.kernels.places import before_each, look_up

ROW, LAYER, SALT = (tl.constexpr(number) for number in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))
FIRST, SECOND = (tl.constexpr(number) for number in (0x7FEB352D, 0x846CA68B))


@triton.jit
def hashed_slots(ids, row, layer, salt, places, shape: tl.constexpr):
    """Slots by a hash of (row, layer, salt), in proportion to the quotas: of one row, one hash."""
    x = row.to(tl.uint32) * ROW ^ layer.to(tl.uint32) * LAYER ^ salt.to(tl.uint32) * SALT
    x = (x ^ x >> 16) * FIRST
    x = (x ^ x >> 15) * SECOND
    x = x ^ x >> 16
    known = (ids >= 0) & (ids < shape.num_experts)
    total = tl.gather(places.total, tl.where(known, ids, 0), 0)
    return look_up(ids, tl.umulhi(x, total.to(tl.uint32)).to(tl.int32), places, shape)


@triton.jit
def exact_slots(
    ids,  # int32 [IDS], of the chunk
    offsets_ptr,  # int32 [E], tokens of each expert on lower ranks
    counts_ptr,  # int32 [chunks, NUM_EXPERTS], from `count_chunk`
    chunk,
    places,  # Places
    shape: tl.constexpr,
):
    """Slots by counting, and which of the `ids` each is for: they come sorted by expert.

    The g-th token of an expert, counted over ranks and in each in order, goes to the first place in slot order whose
    cumulative quota exceeds g."""
    IDS: tl.constexpr = ids.shape[0]
    expert = tl.arange(0, shape.experts)
    inside = expert < shape.num_experts
    before = tl.load(offsets_ptr + expert, mask=inside, other=0)
    for lower in tl.range(0, chunk, loop_unroll_factor=8):
        before += tl.load(counts_ptr + lower * shape.num_experts + expert, mask=inside, other=0)
    counts = tl.load(counts_ptr + chunk * shape.num_experts + expert, mask=inside, other=0)
    shift = before - (tl.cumsum(counts, 0) - counts)
    lane = tl.arange(0, IDS)
    known = (ids >= 0) & (ids < shape.num_experts)
    key = tl.sort(tl.where(known, ids * IDS + lane, shape.num_experts * IDS + lane), 0)
    ids = key // IDS
    nth = lane + tl.gather(shift, tl.minimum(ids, shape.num_experts - 1), 0)
    return look_up(ids, nth, places, shape), key % IDS


@triton.jit
def fill_table(places, width, table_ptr, shape: tl.constexpr):
    """Fill integers [E, width] of a layer with the places of each expert, repeated in proportion to their quotas, by
    largest remainder of quota * width / sum, ties lowest slot; in slot order. Experts without a place: -1."""
    lane = tl.arange(0, shape.replicas)
    there = places.key < HIGHEST
    owner, slot = tl.where(there, places.key // shape.replicas, 0), places.key % shape.replicas
    first, number = tl.gather(places.first, owner, 0), tl.gather(places.number, owner, 0)
    total = tl.gather(places.total, owner, 0).to(tl.uint32)
    quota = (places.end - before_each(places.end, lane)).to(tl.uint32)
    times, left = _divide(tl.where(there, quota, 0), width, total)
    sums = tl.cumsum(times, 0)
    more = width - (before_each(sums, first + number) - before_each(sums, first))
    rank = tl.zeros_like(lane)
    at = 0
    while at < places.most:
        other = tl.minimum(first + at, shape.replicas - 1)
        theirs = tl.gather(left, other, 0)
        rank += ((at < number) & ((theirs > left) | ((theirs == left) & (other < lane)))).to(tl.int32)
        at += 1
    times += (there & (rank < more)).to(tl.int32)
    sums = tl.cumsum(times, 0)
    start = sums - times - before_each(sums, first)
    expert = tl.arange(0, shape.experts)
    nowhere = (expert < shape.num_experts) & (places.number == 0)
    column = 0
    while column < width:
        tl.store(table_ptr + owner * width + column, slot, mask=there & (start <= column) & (column < start + times))
        tl.store(table_ptr + expert * width + column, tl.zeros_like(expert) - 1, mask=nowhere)
        column += 1


@triton.jit
def _divide(quota, width, total):
    """quota * width divided by the total, int32, and what is left, uint32: bit by bit of the width, so that nothing is
    above 2^32. A quota is at most the total, and that below 2^31."""
    times = quota.to(tl.int32) * 0
    left = quota * 0
    bit = 1 << 30
    while bit > 0:
        left += left
        over = (left >= total).to(tl.uint32)
        left -= over * total
        times += times + over.to(tl.int32)
        left += tl.where(width & bit != 0, quota, 0)
        over = (left >= total).to(tl.uint32)
        left -= over * total
        times += over.to(tl.int32)
        bit = bit >> 1
    return times, left
