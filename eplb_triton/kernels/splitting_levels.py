"""The water level of one class: the places that each GPU holds, and the tokens of an expert poured onto them.

What a level needs of the other places of its expert comes by `tl.gather`: a shuffle up to 32 GPUs, where memory and its
barriers cost twice that.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from typing import Any, NamedTuple

import triton
import triton.language as tl

FEW = tl.constexpr(3)  # other places of an expert that are levelled without a loop
NEAR = tl.constexpr(7)  # and in a class that holds an expert of more; beyond these a list is read


class SplitScratch(NamedTuple):
    """Memory of a layer, int32; made in the kernel."""

    counts: Any  # [E], tokens of each expert
    number: Any  # [E], places of each expert that has a class
    first: Any  # [E], where its places begin in `gpus`
    label: Any  # [P], class of the expert of a slot; -1 for one without, and where the slot is no place
    gpus: Any  # [P], GPUs of the places of each expert that has a class, in any order
    held: Any  # [15, P]: HELD_* of the k-th place by class on each GPU, [S, D] each


HELD_LABEL, HELD_SLOT, HELD_COUNT, HELD_OTHERS, HELD_FIRST, HELD_NTH = (tl.constexpr(at) for at in range(6))
HELD_NEAR = tl.constexpr(6)  # NEAR times
HELD_QUOTA = tl.constexpr(6 + 7)  # twice: a round reads one and writes the other


class Place(NamedTuple):
    """The place that each GPU holds next, by class."""

    label: Any
    quota: Any
    count: Any  # tokens of its expert
    others: Any  # other places of its expert
    near_0: Any  # GPUs of the first of them; one's own where there are not so many
    near_1: Any
    near_2: Any


@triton.jit
def next_place(cursor, held, odd, scratch, shape: tl.constexpr):
    P: tl.constexpr = shape.num_replicas
    gpu = tl.arange(0, shape.gpus)
    at = scratch.held + cursor * shape.num_gpus + gpu
    there = cursor < held
    return Place(
        tl.load(at + HELD_LABEL * P, mask=there, other=-1),
        tl.load(at + (HELD_QUOTA + odd) * P, mask=there, other=0),
        tl.load(at + HELD_COUNT * P, mask=there, other=0),
        tl.load(at + HELD_OTHERS * P, mask=there, other=0),
        tl.load(at + HELD_NEAR * P, mask=there, other=gpu),
        tl.load(at + (HELD_NEAR + 1) * P, mask=there, other=gpu),
        tl.load(at + (HELD_NEAR + 2) * P, mask=there, other=gpu),
    )


@triton.jit
def level_few(b, place, others, mine):
    """Quotas of one class: the tokens of each of its experts poured onto its GPUs, of other loads `b`, to one level.

    The places of an expert in order of b: the one of rank r is filled if the tokens exceed r * b less the sum of the r
    lower ones, for then the level of those alone is above b. Here no expert has more than FEW other places."""
    zero = tl.zeros_like(b)
    rank, below = _rank(b, place.near_0, zero, zero)
    rank, below = _rank(b, place.near_1, rank, below)
    rank, below = _rank(b, place.near_2, rank, below)
    filled = mine & _is_filled(b, rank, below, place.count)
    shown, m, total = _fill(filled, b, place.count, FEW - others)
    m, total = _add_filled(shown, place.near_0, m, total)
    m, total = _add_filled(shown, place.near_1, m, total)
    m, total = _add_filled(shown, place.near_2, m, total)
    level = quarter_at_most(total, m)
    return _pour(filled, b, rank, level, m, total)


@triton.jit
def level_many(b, place, others, most, mine, at, scratch, P: tl.constexpr):
    """As `level_few`, where an expert has up to `most` other places."""
    gpu = tl.arange(0, b.shape[0])
    zero = tl.zeros_like(b)
    near_ptr = at + HELD_NEAR * P
    near_3 = tl.load(near_ptr + 3 * P, mask=others > 3, other=gpu)  # all under way at once: one by one, 34 cycles each
    near_4 = tl.load(near_ptr + 4 * P, mask=others > 4, other=gpu)
    near_5 = tl.load(near_ptr + 5 * P, mask=others > 5, other=gpu)
    near_6 = tl.load(near_ptr + 6 * P, mask=others > 6, other=gpu)
    rank, below = _rank(b, place.near_0, zero, zero)
    rank, below = _rank(b, place.near_1, rank, below)
    rank, below = _rank(b, place.near_2, rank, below)
    rank, below = _rank(b, near_3, rank, below)
    rank, below = _rank(b, near_4, rank, below)
    rank, below = _rank(b, near_5, rank, below)
    rank, below = _rank(b, near_6, rank, below)
    i = NEAR + 0
    while i < most:
        rank, below = _rank(b, _far(at, i, others, gpu, scratch, P), rank, below)
        i += 1
    filled = mine & _is_filled(b, rank, below, place.count)
    shown, m, total = _fill(filled, b, place.count, tl.maximum(most, NEAR) - others)
    m, total = _add_filled(shown, place.near_0, m, total)
    m, total = _add_filled(shown, place.near_1, m, total)
    m, total = _add_filled(shown, place.near_2, m, total)
    m, total = _add_filled(shown, near_3, m, total)
    m, total = _add_filled(shown, near_4, m, total)
    m, total = _add_filled(shown, near_5, m, total)
    m, total = _add_filled(shown, near_6, m, total)
    i = NEAR + 0
    while i < most:
        m, total = _add_filled(shown, _far(at, i, others, gpu, scratch, P), m, total)
        i += 1
    return _pour(filled, b, rank, total // tl.maximum(m, 1), m, total)


@triton.jit
def _rank(b, other, rank, below):
    """Count the place on GPU `other`, and its load, if it comes before one's own by (load, slot); one's own does not.

    By sign bits: with a predicate for each comparison, of which there are seven, the steps waited for one another."""
    theirs = tl.gather(b, other, 0)
    before = (theirs + ((other - tl.arange(0, b.shape[0])) >> 31) - b) >> 31  # -1 or 0
    return rank - before, below + (theirs & before)


@triton.jit
def _is_filled(b, rank, below, count):
    return (rank == 0) | (rank.to(tl.int64) * b.to(tl.int64) - below < count)


@triton.jit
def _fill(filled, b, count, absent):
    """What others see of a place: its b, or -1; the places filled and their b with the tokens, where one's own will be
    met again in place of each of the `absent`."""
    own = filled.to(tl.int32) * (1 - absent)
    return tl.where(filled, b, -1), own, count + own * b


@triton.jit
def _add_filled(shown, other, m, total):
    theirs = tl.gather(shown, other, 0)
    no = theirs >> 31  # -1 where it is not filled
    return m + no + 1, total + (theirs & ~no)


@triton.jit
def quarter_at_most(total, m):
    """total // m for m from 1 to 4 and a total below 2^31: a product, where a division takes 130 cycles."""
    half = 0x40000000 >> (m >> 1)
    factor = tl.where(m == 3, 0x2AAAAAAB, half + half).to(tl.uint32, bitcast=True)
    return tl.umulhi((total + total).to(tl.uint32, bitcast=True), factor).to(tl.int32, bitcast=True)


@triton.jit
def _pour(filled, b, rank, level, m, total):
    return tl.where(filled, level - b + (rank < total - level * m).to(tl.int32), 0)


@triton.jit
def _far(at, i, others, gpu, scratch, P: tl.constexpr):
    """The GPU of the i-th other place, from the list of the expert; one's own where there are not so many."""
    first = tl.load(at + HELD_FIRST * P, mask=i < others, other=0)
    nth = tl.load(at + HELD_NTH * P, mask=i < others, other=0)
    return tl.load(scratch.gpus + first + i + (i >= nth).to(tl.int32), mask=i < others, other=gpu)
