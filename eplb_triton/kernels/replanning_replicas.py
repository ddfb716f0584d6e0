"""Replanning, one step: a slot of a donor expert becomes one more replica of an expert of the heaviest GPU.

Every pair of donor slot and receiver is bounded in float32, by the variances that products of two experts' loads make;
what may be the best is valued exactly.
"""
# ruff: noqa: N806, PLR0915, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, bits, divide
from eplb_triton.kernels.replanning_bounds import (
    CUT_OFF,
    LESS,
    NO_BOUND,
    WHOLE_POWER,
    choose_promising,
    squared,
)
from eplb_triton.kernels.replanning_counts import AT_ONCE, ONE_EXPERT
from eplb_triton.kernels.replanning_history import sample_at
from eplb_triton.kernels.replanning_potential import (
    INVERSE,
    NO_GAIN,
    POWER_LIMIT,
    TOO_MUCH,
    floats_of,
    load_number,
    power_or_limit,
    root_near,
    score,
    sum_in_halves,
    sum_of_squares,
)
from eplb_triton.kernels.replanning_swaps import ABOVE_TOP

UNSURE = tl.constexpr(0x7FFFFFFF)
"""Above the bits of every bound."""
LOST = tl.constexpr(2.0**36)
"""In place of the power of a score above the top: no sum of gains makes up for it, and little is lost to rounding."""


@triton.jit(noinline=True)
def bound_replicas(memory, heaviest, top, low, high, starts, listed, most, shape: tl.constexpr):
    """memory.promising: one of those with the largest upper bound of each few lanes, of all new replicas: own slot i,
    and donor slot, as i * P + its place in the node. Returns the largest bound, and the largest of the others (bits).

    An expert of the heaviest GPU is passed over if one replica more, that no GPU receives yet, lowers the potential by
    no more than `low`. By i, memory.lowered: by how much it does, NO_GAIN where it is passed over. If for any it is
    more than `low`, and no more than `high`, the largest bound is UNSURE.

    Float32, each at least what it says. Of i and a donor slot: memory.fall, by how much the power of its GPU
    falls when another GPU receives; memory.received, by how much more when it does itself, NO_BOUND where it cannot. Of
    i and an expert's first donor slot: memory.falls, by how much the potential falls when another GPU receives.

    starts, listed: of `value_changes`. most: no donor has more replicas."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    floats = floats_of(memory)
    first_expert, first = starts // ONE_EXPERT, starts % ONE_EXPERT
    inverse = divide(1.0, tl.maximum(top, 1)) * LESS
    of_root = inverse * (shape.z * 0.7071067811865475 * LESS)
    pairs = listed % ONE_EXPERT * S
    start = 0
    while start < pairs:  # own slots and donor slots
        at = start + tl.arange(0, shape.lanes)
        inside = at < pairs
        at = tl.minimum(at, pairs - 1)
        place = at // S
        i = at - place * S
        gpu = tl.load(memory.ints + shape.at.donor + first + place) // S
        b = tl.load(memory.ints + shape.at.donor_of + first + place)
        of_pair = i * D + gpu - heaviest // D * D
        power = tl.load(memory.ints + shape.at.gpu_power + gpu).to(tl.float32)
        kept = tl.load(memory.ints + shape.at.fewer_power + place).to(tl.float32)
        kept = tl.where(kept > WHOLE_POWER, LOST, kept)
        left_sum = tl.load(floats + shape.at.left_sum + place)
        left_variance = tl.load(floats + shape.at.left_variance + place)
        rise_sum = tl.load(floats + shape.at.rise_sum + place)
        rise_variance = tl.load(floats + shape.at.rise_variance + place)
        held_sum = tl.load(floats + shape.at.held_sum + of_pair)
        held_variance = tl.load(floats + shape.at.held_variance + of_pair)
        held_power = tl.load(memory.ints + shape.at.held_power + of_pair).to(tl.float32)
        own_sum = tl.load(floats + shape.at.own_sum + i)
        own_variance = tl.load(floats + shape.at.own_variance + i)
        own_part = tl.load(floats + shape.at.own_part + i)
        its_part = tl.load(floats + shape.at.inverse_count + E + b)
        into = tl.load(floats + shape.at.into_partner + of_pair)
        product = tl.load(floats + shape.at.product + i * E + b)
        # a GPU that holds both gets less of a and more of b; another one gives b for a
        holds = into == TOO_MUCH
        one = tl.where(holds, rise_variance, left_variance)
        other = tl.where(holds, held_variance, into * own_part - own_variance)
        product *= tl.where(holds, (1.0 - own_part) * its_part, own_part)
        # of both, so that no load waits for which of them it is
        off = tl.abs(left_variance) + tl.abs(rise_variance) + tl.abs(other) + tl.abs(product) + own_variance
        mean = tl.where(holds, rise_sum + held_sum, left_sum + own_sum)
        root = root_near(tl.maximum(one + other - product - off * 2.0**-20, 1.0)) * of_root
        near = squared(tl.maximum(mean * inverse + root, 0.0), shape)
        after = tl.where(near > 1.0, LOST, near * WHOLE_POWER - CUT_OFF)
        fall = tl.where(holds, held_power - after, power - kept)
        received = tl.where(holds | (near > 1.0), NO_BOUND, kept - after)
        tl.store(floats + shape.at.fall + i * P + place, fall, mask=inside)
        tl.store(floats + shape.at.received + i * P + place, received, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    bound = tl.full((shape.lanes,), 0.0, tl.float32)
    second, promising = bound, tl.full((shape.lanes,), 0, tl.int32)
    unsure = promising > 0
    pairs = listed // ONE_EXPERT * S
    start = 0
    while start < pairs:  # own slots and donor experts
        at = start + tl.arange(0, shape.lanes)
        inside = at < pairs
        at = tl.minimum(at, pairs - 1)
        donor = at // S
        i = at - donor * S
        b = tl.load(memory.ints + shape.at.donor_expert + first_expert + donor)
        count = tl.load(memory.ints + shape.at.count + b)
        place = i * P + tl.load(memory.ints + shape.at.donor_first + b) - first
        # a rounding of sums of powers is 64 or less for each of them; 2^12 of LOST, which is added and taken off again
        falls = (count + 2).to(tl.float32) * (count + 2).to(tl.float32) * CUT_OFF + 2.0**15
        grown_ptr = memory.longs + shape.at.grown + i[:, None] * shape.grown_row + tl.arange(0, 2)[None, :]
        lowered = tl.full((shape.lanes, 2), 0, tl.int64)
        best = tl.full((shape.lanes,), NO_BOUND, tl.float32)
        next_best, best_place = best, place
        nth = 0
        while nth < most:
            some = ()
            for also in tl.static_range(AT_ONCE):  # behind an expert's last one lies what is not looked at
                fall = tl.load(floats + shape.at.fall + place + nth + also)
                received = tl.load(floats + shape.at.received + place + nth + also)
                some = some + ((fall, received),)
            for also in tl.static_range(0, AT_ONCE, 2):
                lowered += tl.load(grown_ptr + nth + also)
            for also in tl.static_range(AT_ONCE):
                n = nth + also
                falls += tl.where(n < count, some[also][0], 0.0)
                received = tl.where(n < count, some[also][1], NO_BOUND)
                next_best = tl.maximum(next_best, tl.minimum(best, received))
                best_place = tl.where(received > best, place + n, best_place)
                best = tl.maximum(best, received)
            nth += AT_ONCE
        lowered = tl.sum(lowered, 1)
        passes = inside & (lowered > low)
        unsure = unsure | (passes & (lowered <= high))
        lowered = tl.where(passes, lowered, NO_GAIN)
        falls = tl.where(passes, falls + lowered.to(tl.float32), NO_BOUND)
        tl.store(memory.longs + shape.at.lowered + i, lowered, mask=inside & (donor == 0))
        tl.store(floats + shape.at.falls + place, falls, mask=inside)
        best, next_best = tl.maximum(falls + best, 0.0), tl.maximum(falls + next_best, 0.0)
        second = tl.maximum(tl.maximum(second, next_best), tl.minimum(bound, best))
        promising = tl.where(best > bound, best_place, promising)
        bound = tl.maximum(bound, best)
        start += shape.lanes
    highest = tl.max(tl.where(unsure, UNSURE, bits(bound)), 0)
    return highest, choose_promising(memory, bits(bound), bits(second), promising, shape)


@triton.jit(noinline=True)
def find_replica(memory, samples, heaviest, top, rest, floor, starts, listed, most, shape: tl.constexpr):
    """The best new replica: gain, int64, and its key (own slot i, donor, receiving GPU). Ties: the lowest key. None
    gains more than `floor`: any gain up to it.

    rest: of `bound_replicas`. starts, listed: of `value_changes`. most: no donor has more replicas."""
    ROWS: tl.constexpr = shape.swap_rows
    KEYS: tl.constexpr = 1 << shape.key_bits  # more than there are
    first = starts % ONE_EXPERT
    num = tl.full((), ROWS, tl.int32)
    start = tl.full((), 0, tl.int32)
    best = _value_replicas(memory, samples, heaviest, top, first, start, num, most, shape)
    gain = (best >> shape.key_bits).to(tl.int64)
    least = bits(tl.maximum(floor, gain).to(tl.float32) * LESS)
    if rest >= least:
        num = _list_replicas(memory, least, starts, listed, shape)
        while start < num:
            found = _value_replicas(memory, samples, heaviest, top, first, start, num, most, shape)
            best = tl.maximum(best, found)
            start += ROWS
    return (best >> shape.key_bits).to(tl.int64), KEYS - 1 - (best.to(tl.int32) & (KEYS - 1))


@triton.jit
def _list_replicas(memory, least, starts, listed, shape: tl.constexpr):
    """memory.promising: new replicas whose bound has at least these bits. Returns how many."""
    S: tl.constexpr = shape.slots
    P: tl.constexpr = shape.replicas // shape.nodes
    floats = floats_of(memory)
    first, pairs = starts % ONE_EXPERT, listed % ONE_EXPERT * S
    tl.debug_barrier()
    num = tl.full((), 0, tl.int32)
    start = 0
    while start < pairs:
        at = start + tl.arange(0, shape.lanes)
        inside = at < pairs
        at = tl.minimum(at, pairs - 1)
        place = at // S
        i = at - place * S
        b = tl.load(memory.ints + shape.at.donor_of + first + place)
        b_place = tl.load(memory.ints + shape.at.donor_first + b) - first
        falls = tl.load(floats + shape.at.falls + i * P + b_place)
        received = tl.load(floats + shape.at.received + i * P + place)
        bound = bits(tl.maximum(falls + received, 0.0))
        reaches = (inside & (bound >= least)).to(tl.int32)
        promising_ptr = memory.ints + shape.at.promising + num + tl.cumsum(reaches, 0) - reaches
        tl.store(promising_ptr, i * P + place, mask=reaches > 0)
        num += tl.sum(reaches, 0)
        start += shape.lanes
    tl.debug_barrier()
    return num


@triton.jit(noinline=True)
def _value_replicas(memory, samples, heaviest, top, first, start, num, most, shape: tl.constexpr):
    """The best of the first `num` of memory.promising, from place `start` on, as many as there are rows: its gain times
    2^key_bits, plus what its key is below the highest, uint64; 0 of none that gains."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    T: tl.constexpr = shape.row
    KEYS: tl.constexpr = 1 << shape.key_bits
    at = tl.load(memory.ints + shape.at.promising + tl.minimum(start + tl.arange(0, shape.swap_rows), num - 1))
    i = at // P
    place = at - i * P
    slot = tl.load(memory.ints + shape.at.donor + first + place)
    a = tl.load(memory.ints + shape.at.slot + heaviest * S + i)
    b = tl.load(memory.ints + shape.at.slot + slot)
    gpu = slot // S
    times = tl.load(memory.ints + shape.at.times + slot)
    lowered = tl.load(memory.longs + shape.at.lowered + i)
    pair = i * D - heaviest // D * D  # of i and GPU 0
    # a GPU that holds b = a as well cannot receive
    allowed = (lowered != NO_GAIN) & (times > 0) & (tl.load(memory.ints + shape.at.held_at + pair + gpu) < 0)
    count = tl.load(memory.ints + shape.at.count + b)
    b_first = tl.load(memory.ints + shape.at.donor_first + b)
    after = _power_with(memory, samples, gpu, top, b, times - 1, times, a, times * 0 + 1, times * 0, shape)
    gain = lowered + _limit(tl.load(memory.ints + shape.at.fewer_power + place)) - after
    nth = 0
    while nth < most:
        n = nth + tl.arange(0, T)[None, :]
        there = n < count[:, None]
        n = tl.minimum(n, count[:, None] - 1)
        other = tl.load(memory.ints + shape.at.donor + b_first[:, None] + n)
        holds = there & (tl.load(memory.ints + shape.at.held_at + pair[:, None] + other // S) >= 0)
        power = tl.load(memory.ints + shape.at.gpu_power + other // S)
        worth = power - _limit(tl.load(memory.ints + shape.at.fewer_power + b_first[:, None] - first + n))
        gain += sum_in_halves(tl.where(there & (holds == 0), worth, 0))
        holds = holds & (tl.load(memory.ints + shape.at.times + other) > 0)
        more = tl.max(tl.sum(holds.to(tl.int32), 1), 0)
        last = count * 0 - 1
        while more > 0:  # GPUs that hold both, the next one of each
            last = tl.min(tl.where(holds & (n > last[:, None]), n, HIGHEST), 1)
            found = last < HIGHEST
            shared = tl.load(memory.ints + shape.at.donor + b_first + tl.where(found, last, 0))
            held = tl.load(memory.ints + shape.at.held_at + pair + shared // S)
            b_times = tl.load(memory.ints + shape.at.times + shared)
            a_times = tl.load(memory.ints + shape.at.times + tl.maximum(held, 0))
            after = _power_with(memory, samples, shared // S, top, b, b_times, b_times, a, a_times, a_times, shape)
            held_power = _limit(tl.load(memory.ints + shape.at.held_power + pair + shared // S))
            gain += tl.where(found, held_power - after, 0)
            more -= 1
        nth += T
    key = (i * E + b) * D + gpu - heaviest // D * D
    # a gain is at most the potential, 2^30 a GPU, so that with its key it takes 64 bits
    both = (gain.to(tl.uint64) << shape.key_bits) | (KEYS - 1 - key).to(tl.uint64)
    return tl.max(tl.where(allowed & (gain > 0), both, 0), 0)


@triton.jit
def _limit(power):
    """Powers, int64, of int32 ones that are ABOVE_TOP where a score is."""
    return tl.where(power == ABOVE_TOP, POWER_LIMIT, power.to(tl.int64))


@triton.jit
def _power_with(memory, samples, gpu, top, b, b_gets, b_gives, a, a_gets, a_gives, shape: tl.constexpr):
    """Power, int64, of GPUs [rows] that get and give replicas: of b, those of one replica fewer for those of its count;
    of a, those of one replica more."""
    E: tl.constexpr = shape.experts
    ROW: tl.constexpr = shape.row
    t = tl.arange(0, ROW)[None, :]
    level_ptr = memory.ints + shape.at.level
    its_b, its_a = sample_at(b[:, None], t, E, shape), sample_at(a[:, None], t, E, shape)
    load = tl.load(memory.ints + shape.at.gpu_load + sample_at(gpu[:, None], t, shape.gpus, shape))
    load += b_gets[:, None] * tl.load(level_ptr + E * ROW + its_b) - b_gives[:, None] * tl.load(level_ptr + its_b)
    load += a_gets[:, None] * tl.load(level_ptr + 2 * E * ROW + its_a) - a_gives[:, None] * tl.load(level_ptr + its_a)
    sum_ptr, spread_ptr = memory.ints + shape.at.sum, memory.longs + shape.at.spread
    mean = tl.load(memory.ints + shape.at.gpu_sum + gpu)
    mean += b_gets * tl.load(sum_ptr + E + b) - b_gives * tl.load(sum_ptr + b)
    mean += a_gets * tl.load(sum_ptr + 2 * E + a) - a_gives * tl.load(sum_ptr + a)
    spread = tl.load(memory.longs + shape.at.gpu_spread + gpu)
    spread += b_gets * tl.load(spread_ptr + E + b) - b_gives * tl.load(spread_ptr + b)
    spread += a_gets * tl.load(spread_ptr + 2 * E + a) - a_gives * tl.load(spread_ptr + a)
    variance = samples * sum_of_squares(load) - mean.to(tl.int64) * mean + spread
    return power_or_limit(score(mean, variance, shape), top, load_number(memory, INVERSE, shape), shape)
