"""Give every expert its replicas: picks one at a time, each on the counts as they then are."""
# ruff: noqa: N803, N806, SIM108
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import (
    EPSILON,
    HIGHEST,
    at,
    bits,
    divide,
    float64,
    from_bits,
    largest,
    ordered_sum,
    owner_of_each,
    round_half_even,
    smallest,
)
from eplb_triton.kernels.sorting import sort_descending

LEAST_VARIATION, MOST_VARIATION = (tl.constexpr(bound) for bound in constants.VARIATION_RANGE)
SMALLEST_NORMAL = tl.constexpr(0x00800000)  # bits of 2^-126


@triton.jit
def pick_dhondt(
    replicas,
    counts,  # int32 [expert_lanes], replicas of each expert
    start,
    stop,
    LISTED: tl.constexpr,  # whether the list of replicas is made, too
    FROM_ONES: tl.constexpr,  # whether counts are all 1: then most picks may be made at once
    shape: tl.constexpr,  # Replicating; with a list, at most pick_lanes picks
):
    """Picks start..stop-1: the expert of largest replica load. Ties: lowest expert. Returns the counts."""
    if FROM_ONES and shape.at_once:
        counts, bulk = _pick_at_once(replicas, start, stop, LISTED, shape)
        start += bulk
    return _pick_one_by_one(replicas, counts, start, stop, False, LISTED, shape)


@triton.jit
def pick_sainte_lague(replicas, counts, start, stop, LISTED: tl.constexpr, shape: tl.constexpr):
    """As `pick_dhondt`, by largest load / (2 * count - 1)."""
    return _pick_one_by_one(replicas, counts, start, stop, True, LISTED, shape)


@triton.jit
def pick_peak_aware(replicas, counts, start, stop, shape: tl.constexpr):
    """Whichever of the D'Hondt and the Sainte-Laguë pick leaves the lower peak of replica loads; near ties: D'Hondt's
    unless its second peak is higher."""
    return _pick_by_peak(replicas, counts, start, stop, False, shape)


@triton.jit
def pick_gated(replicas, counts, start, stop, shape: tl.constexpr):
    """As `pick_peak_aware`, with the true largest of the others, and D'Hondt's pick while loads are level.
    Ties of the Sainte-Laguë pick: smaller replica load, then lowest expert."""
    return _pick_by_peak(replicas, counts, start, stop, True, shape)


@triton.jit
def fixed_tail(NUM_REDUNDANT: tl.constexpr):
    """T0: a tenth of the redundant replicas, rounded up, at least 1."""
    return (NUM_REDUNDANT + 9) // 10


@triton.jit
def dispersion_tail(
    statistics_ptr,  # float64 [num_rows], coefficient of variation of every row
    num_rows,
    NUM_REDUNDANT: tl.constexpr,
):
    """A tenth of the redundant replicas, times the mean coefficient of variation held between 0.7 and 1.3,
    rounded half to even."""
    variation, _, _ = _ordered_sums(statistics_ptr, num_rows, 1)
    scale = tl.minimum(
        tl.maximum(variation / num_rows.to(tl.float64), float64(LEAST_VARIATION)), float64(MOST_VARIATION)
    )
    tail = round_half_even(float64(0.10 * NUM_REDUNDANT) * scale)
    return tl.minimum(tl.maximum(tail, 1), NUM_REDUNDANT)


@triton.jit
def simulated_tail(
    statistics_ptr,  # float64 [3, num_rows], peak of replica loads of every row under each of the candidate lengths
    num_rows,
    NUM_REDUNDANT: tl.constexpr,
):
    """Tail length of the lowest mean peak, among the fixed length and its two neighbours. Ties: the shortest."""
    FIXED: tl.constexpr = (NUM_REDUNDANT + 9) // 10
    SHORTEST: tl.constexpr = FIXED - 1 if FIXED > 1 else 1
    LONGEST: tl.constexpr = FIXED + 1 if FIXED + 1 < NUM_REDUNDANT else NUM_REDUNDANT
    first, second, third = _ordered_sums(statistics_ptr, num_rows, LONGEST - SHORTEST + 1)
    rows = num_rows.to(tl.float64)
    best = first / rows
    tail = SHORTEST
    if LONGEST > SHORTEST:
        score = second / rows
        tail = tl.where(score < best, SHORTEST + 1, tail)
        best = tl.minimum(score, best)
    if LONGEST > SHORTEST + 1:
        tail = tl.where(third / rows < best, LONGEST, tail)
    return tail


@triton.jit
def _ordered_sums(statistics_ptr, num_rows, COLUMNS: tl.constexpr):
    """Sums of up to three columns, each left to right in float64.

    Loads of 16 rows are under way at once; past the end they are 0, and adding 0 changes no sum."""
    first = float64(0.0)
    second = float64(0.0)
    third = float64(0.0)
    start = 0
    while start < num_rows:
        for i in tl.static_range(16):
            row = start + i
            there = row < num_rows
            first += tl.load(statistics_ptr + row, mask=there, other=0.0)
            if COLUMNS > 1:
                second += tl.load(statistics_ptr + num_rows + row, mask=there, other=0.0)
            if COLUMNS > 2:
                third += tl.load(statistics_ptr + 2 * num_rows + row, mask=there, other=0.0)
        start += 16
    return first, second, third


@triton.jit
def _pick_one_by_one(
    replicas, counts, start, stop, SAINTE_LAGUE: tl.constexpr, LISTED: tl.constexpr, shape: tl.constexpr
):
    """After a pick one quotient changes: dividing that one alone costs half of dividing them all."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    expert = tl.arange(0, shape.expert_lanes)
    loads = tl.load(replicas.loads + expert, mask=expert < NUM_EXPERTS, other=0.0)
    if SAINTE_LAGUE:
        key = bits(divide(loads, counts + counts - 1))
    else:
        key = bits(divide(loads, counts))
    key = tl.where(expert < NUM_EXPERTS, key, -1)
    numbered = (expert << 16) + counts  # one reduction gives the expert and its count
    place = start
    while place < stop:
        _, found = largest(key, numbered)
        picked = found >> 16
        count = found & 0xFFFF
        if LISTED:
            tl.store(replicas.expert + place, picked)
            tl.store(replicas.rank + place, count)
        load = tl.load(replicas.loads + picked)
        if SAINTE_LAGUE:
            quotient = divide(load, count + count + 1)
        else:
            quotient = divide(load, count + 1)
        here = expert == picked
        key = tl.where(here, bits(quotient), key)
        numbered = tl.where(here, found + 1, numbered)
        place += 1
    return numbered & 0xFFFF


@triton.jit
def _pick_at_once(replicas, start, stop, LISTED: tl.constexpr, shape: tl.constexpr):
    """The first D'Hondt picks from counts of 1; returns the counts and how many were picked, at most stop - start.

    The picks are the quotients load / r, r = 1, 2, ..., of all experts in descending order, ties by expert, then r. So
    all above a threshold are the first of them, whatever the threshold: it is bisected until few picks are left."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    wanted = tl.full((), 0, tl.int32) + stop - start
    expert = tl.arange(0, shape.expert_lanes)
    loads = tl.load(replicas.loads + expert, mask=expert < NUM_EXPERTS, other=0.0)
    high = tl.max(bits(loads), 0)  # nothing is above it; above the lower end one expert alone has too many
    low = tl.maximum(bits(divide(from_bits(high), wanted + 2)), SMALLEST_NORMAL)
    left = wanted
    while (high - low > 1) & (left > 2):
        middle = low + (high - low) // 2
        about = loads * divide(1.0, from_bits(middle))  # good enough to steer by, and 8 times faster
        total = tl.sum(tl.minimum(about, wanted + 2.0).to(tl.int32), 0)
        fits = total <= wanted
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
        left = tl.where(fits, wanted - total, left)
    high = tl.maximum(high, SMALLEST_NORMAL)
    picks = _quotients_above(loads, from_bits(high), wanted + 2)
    while tl.sum(picks, 0) > wanted:
        high += 16  # past the error of `about`, a few units of the last place
        picks = _quotients_above(loads, from_bits(high), wanted + 2)
    picked = tl.sum(picks, 0)
    if LISTED:
        place = tl.arange(0, shape.pick_lanes)
        owner, before = owner_of_each(picks, expert, replicas.spare, place, NUM_EXPERTS)
        there = place < picked
        quotient = divide(tl.load(replicas.loads + owner, mask=there, other=0.0), before + 1)
        order = (-bits(quotient)).to(tl.int64) << 32
        order = order | (owner << 16).to(tl.int64) | (before + 1).to(tl.int64)
        order = ~sort_descending(~tl.where(there, order, 0x7FFFFFFFFFFFFFFF), replicas.keys)
        order = order.to(tl.int32)
        tl.store(replicas.expert + start + place, order >> 16, mask=there)
        tl.store(replicas.rank + start + place, order & 0xFFFF, mask=there)
    return picks + 1, picked


@triton.jit
def _quotients_above(loads, threshold, most):
    """For every expert, how many of load / 1, load / 2, ... are above a threshold (a normal number), or `most` - 1 or
    `most` if they are that many.

    Quotients fall with r. One that rounds to above the threshold is above it, so r <= load / threshold; and up to
    r = 2^20, r <= load / threshold - 1 leaves it above by more than rounding. So only the last r can fail."""
    ratio = divide(loads, tl.zeros_like(loads) + threshold)
    count = tl.minimum(ratio, most.to(tl.float32)).to(tl.int32)
    fails = divide(loads, tl.maximum(count, 1)) <= threshold
    return tl.maximum(count - fails.to(tl.int32), 0)


@triton.jit
def _pick_by_peak(replicas, counts, start, stop, GATED: tl.constexpr, shape: tl.constexpr):
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < NUM_EXPERTS
    loads = tl.load(replicas.loads + expert, mask=inside, other=0.0)
    average = tl.where(inside, bits(divide(loads, counts)), -1)
    odd = tl.where(inside, bits(divide(loads, counts + counts - 1)), -1)
    place = start
    while place < stop:
        heaviest, dhondt = largest(average, expert)
        second = heaviest
        if NUM_EXPERTS > 1:
            second = tl.max(tl.where(expert == dhondt, -1, average), 0)
        highest, sainte_lague = largest(odd, expert)
        others = second
        if GATED:
            _, sainte_lague = smallest(tl.where(odd == highest, average, HIGHEST), expert)
            others = tl.where(sainte_lague == dhondt, second, heaviest)
        count_d = at(counts, expert, dhondt)
        count_s = at(counts, expert, sainte_lague)
        new_d = bits(divide(tl.load(replicas.loads + dhondt), count_d + 1))
        new_s = bits(divide(tl.load(replicas.loads + sainte_lague), count_s + 1))
        peak_d = from_bits(tl.maximum(second, new_d))
        peak_s = from_bits(tl.maximum(others, new_s))
        below_d = from_bits(tl.minimum(second, new_d))
        below_s = from_bits(tl.minimum(others, new_s))
        near = tl.abs(peak_d - peak_s) <= EPSILON
        if GATED:
            rarer = (tl.abs(below_d - below_s) <= EPSILON) & (count_d <= count_s)
            take_d = (peak_d + EPSILON < peak_s) | (near & ((below_d + EPSILON < below_s) | rarer))
            take_d = take_d | _level(average, from_bits(heaviest), replicas.average, NUM_EXPERTS)
        else:
            take_d = (peak_d + EPSILON < peak_s) | (near & (below_d <= below_s))
        picked = tl.where(take_d, dhondt, sainte_lague)
        count = tl.where(take_d, count_d, count_s)
        tl.store(replicas.expert + place, picked)
        tl.store(replicas.rank + place, count)
        here = expert == picked
        average = tl.where(here, tl.where(take_d, new_d, new_s), average)
        odd = tl.where(here, bits(divide(tl.load(replicas.loads + picked), count + count + 1)), odd)
        counts = tl.where(here, count + 1, counts)
        place += 1
    return counts


@triton.jit
def _level(average, heaviest, average_ptr, NUM_EXPERTS: tl.constexpr):
    """Whether the gate is shut: clamp(max / max(mean, 1e-12) - 1, 0, 1) <= 1e-12, in float32.

    The exact mean is a serial sum. A sum in any order is within NUM_EXPERTS * 2^-53 of it, so where it puts the
    largest a millionth above the mean, the gate is open and nothing more need be known."""
    values = tl.where(average < 0, 0.0, from_bits(average))
    about = tl.sum(values.to(tl.float64), 0) / float64(1.0 * NUM_EXPERTS)
    level = heaviest.to(tl.float64) <= tl.maximum(about, float64(EPSILON)) * float64(1.000001)
    if level:
        expert = tl.arange(0, average.shape[0])
        tl.debug_barrier()
        tl.store(average_ptr + expert, values, mask=expert < NUM_EXPERTS)
        tl.debug_barrier()
        mean = (ordered_sum(average_ptr, NUM_EXPERTS) / float64(1.0 * NUM_EXPERTS)).to(tl.float32)
        level = divide(heaviest, tl.maximum(mean, EPSILON)) - 1.0 <= EPSILON
    return level
