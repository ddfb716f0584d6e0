"""Waterfill: replica counts from a common level that every replica's load is brought down to."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import (
    at,
    bits,
    ceiling,
    divide,
    float64,
    from_bits,
    largest,
    owner_of_each,
    round_half_even,
)
from eplb_triton.kernels.sorting import sort_descending

BISECTIONS = tl.constexpr(constants.BISECTIONS)


@triton.jit
def waterfill_counts(replicas, shape: tl.constexpr):
    """Counts [expert_lanes] int32 that sum to num_replicas. Ties: lowest expert."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    NUM_REPLICAS: tl.constexpr = shape.num_replicas
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < NUM_EXPERTS
    loads = tl.load(replicas.loads + expert, mask=inside, other=0.0)
    counts = inside.to(tl.int32)
    if NUM_REPLICAS > NUM_EXPERTS:
        heaviest = from_bits(tl.max(bits(loads), 0))
        if heaviest == 0.0:
            counts = tl.where(inside, NUM_REPLICAS // NUM_EXPERTS + (expert < NUM_REPLICAS % NUM_EXPERTS), 0)
        else:
            level = _level(loads, heaviest, expert, NUM_REPLICAS, NUM_EXPERTS)
            counts = _counts_at(loads, level.to(tl.float32), expert, NUM_REPLICAS, NUM_EXPERTS)
            extras = NUM_REPLICAS - tl.sum(counts, 0)
            share = round_half_even(float64(0.1 * (NUM_REPLICAS - NUM_EXPERTS)))
            tail = tl.minimum(extras, tl.maximum(share, 1))
            counts = _add_bulk(loads, counts, extras - tail, expert, replicas.keys, NUM_EXPERTS)
            if NUM_EXPERTS == 1:
                counts += tl.where(inside, tail, 0)
            else:
                counts = _add_tail(replicas.loads, loads, counts, tail, expert, NUM_EXPERTS)
    return counts


@triton.jit
def list_by_expert(counts, replicas, shape: tl.constexpr):
    """The replica list: expert 0's replicas, then expert 1's, and so on."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    place = tl.arange(0, shape.replica_lanes)
    owner, rank = owner_of_each(counts, tl.arange(0, shape.expert_lanes), replicas.spare, place, NUM_EXPERTS)
    tl.store(replicas.expert + place, owner, mask=place < shape.num_replicas)
    tl.store(replicas.rank + place, rank, mask=place < shape.num_replicas)
    tl.debug_barrier()


@triton.jit
def _level(loads, heaviest, expert, NUM_REPLICAS: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """The lowest level found, in float64, at which at most NUM_REPLICAS replicas are needed.

    Replicas depend on the level in float32 alone. Once no float32 lies between the ends, every later middle rounds to
    one of them and moves that end only within its own rounding: the level in float32 stands, after about 26 of 40.
    Products with the reciprocal settle most steps: they are within 2^-22 of the quotient, and only where its
    neighbourhood of 2^-20 holds an integer can the number of replicas differ."""
    low = float64(0.0)
    high = tl.maximum(heaviest.to(tl.float64), float64(1.0))
    step = 0
    while (step < BISECTIONS) & (bits(high.to(tl.float32)) - bits(low.to(tl.float32)) > 1):
        middle = (low + high) / 2
        level = middle.to(tl.float32)
        about = loads * divide(1.0, level)
        fewest = _whole_replicas(about * (1 - 2.0**-20), expert, NUM_REPLICAS, NUM_EXPERTS)
        most = _whole_replicas(about * (1 + 2.0**-20), expert, NUM_REPLICAS, NUM_EXPERTS)
        enough = tl.sum(most, 0) <= NUM_REPLICAS
        surely_not = tl.sum(fewest, 0) > NUM_REPLICAS
        if (enough == 0) & (surely_not == 0):
            enough = tl.sum(_counts_at(loads, level, expert, NUM_REPLICAS, NUM_EXPERTS), 0) <= NUM_REPLICAS
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
        step += 1
    return high


@triton.jit
def _counts_at(loads, level, expert, NUM_REPLICAS: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """Replicas that bring every expert's replica load down to `level` (float32), at least one each."""
    return _whole_replicas(divide(loads, tl.zeros_like(loads) + level), expert, NUM_REPLICAS, NUM_EXPERTS)


@triton.jit
def _whole_replicas(needed, expert, NUM_REPLICAS: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """`needed` rounded up to at least 1, and cut off just above NUM_REPLICAS, where the sum is too large anyway."""
    count = ceiling(tl.minimum(needed, NUM_REPLICAS + 1.0))
    return tl.where(expert < NUM_EXPERTS, tl.maximum(count, 1), 0)


@triton.jit
def _add_bulk(loads, counts, bulk, expert, keys_ptr, NUM_EXPERTS: tl.constexpr):
    """Add `bulk` replicas, one each to the experts of largest replica load, round after round; a whole round takes
    every expert, so only the last needs the order."""
    inside = expert < NUM_EXPERTS
    counts += tl.where(inside, bulk // NUM_EXPERTS, 0)
    rest = bulk % NUM_EXPERTS
    if rest > 0:
        average = bits(divide(loads, tl.maximum(counts, 1)))
        key = (average.to(tl.int64) << 32) | (0xFFFF - expert).to(tl.int64)
        key = tl.where(inside, key, -1)
        in_order = sort_descending(key, keys_ptr)
        least = tl.min(tl.where(expert < rest, in_order, 0x7FFFFFFFFFFFFFFF), 0)
        counts += (inside & (key >= least)).to(tl.int32)
    return counts


@triton.jit
def _add_tail(loads_ptr, loads, counts, tail, expert, NUM_EXPERTS: tl.constexpr):
    """Add `tail` replicas one by one: whichever of the next D'Hondt and Sainte-Laguë picks has the smallest key
    (peak, largest of the others, -load); ties: D'Hondt's. Loads are at least +0, so their bits compare as they do."""
    inside = expert < NUM_EXPERTS
    shared = tl.maximum(counts, 1)
    average = tl.where(inside, bits(divide(loads, shared)), -1)
    after = tl.where(inside, bits(divide(loads, shared + 1)), -1)
    odd = tl.where(inside, bits(divide(loads, shared + shared + 1)), -1)
    step = 0
    while step < tail:
        first, heaviest = largest(average, expert)
        second = tl.max(tl.where(expert == heaviest, -1, average), 0)
        new_d, dhondt = largest(after, expert)
        _, sainte_lague = largest(odd, expert)
        new_s = at(after, expert, sainte_lague)
        others_d = tl.where(dhondt == heaviest, second, first)
        others_s = tl.where(sainte_lague == heaviest, second, first)
        peak_d = tl.maximum(others_d, new_d)
        peak_s = tl.maximum(others_s, new_s)
        load_d = tl.load(loads_ptr + dhondt)
        load_s = tl.load(loads_ptr + sainte_lague)
        lower = (others_s < others_d) | ((others_s == others_d) & (load_s > load_d))
        take_s = (peak_s < peak_d) | ((peak_s == peak_d) & lower)
        picked = tl.where(take_s, sainte_lague, dhondt)
        load = tl.where(take_s, load_s, load_d)
        count = at(counts, expert, picked) + 1
        here = expert == picked
        counts = tl.where(here, count, counts)
        average = tl.where(here, after, average)
        after = tl.where(here, bits(divide(load, count + 1)), after)
        odd = tl.where(here, bits(divide(load, count + count + 1)), odd)
        step += 1
    return counts
