"""Replanning, one step: the best swap. All are bounded in float32, what may be the best is valued exactly.

A bound is never below the gain: scores and powers are taken for less than they are, by 2^-20 a rounded operation and
two Newton steps of a root, which come from below. One swap in ten thousand then has a bound above the best gain.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import HIGHEST, bits, largest
from eplb_triton.kernels.replanning_potential import INVERSE, load_number, power_of, root_below, score

LESS = tl.constexpr(1.0 - 2.0**-20)
"""Float32 roundings, of 2^-24 each: there are at most eight where this is taken off."""
GREATER = tl.constexpr(1.0 + 2.0**-18)
"""Of a sum that is taken off: more than twice what `LESS` makes of it."""
WHOLE_POWER = tl.constexpr(2.0**constants.POWER_BITS)
NO_BOUND = tl.constexpr(-(2.0**40))
"""Of swaps that are not allowed: all others' bounds of twice the gain are above, or below 0 by far."""
SLACK = tl.constexpr(1024.0)
"""Of twice a gain, below 2^31: its roundings are of 128, and powers are cut, by 2 * norm at most."""
AT_ONCE = tl.constexpr(3)
"""Slots of the heaviest GPU that a lane tries with one slot of another: what that one brings is looked up once."""


@triton.jit(noinline=True)
def find_swap(memory, heaviest, top, floor, shape: tl.constexpr):
    """The best swap of a slot of the heaviest GPU with one of another GPU of its node: gain a slot, int32, and its key
    (partner, own slot, partner's slot). Ties: the lowest key. None gains more than `floor`: any gain up to it."""
    S: tl.constexpr = shape.slots
    OTHERS: tl.constexpr = (shape.gpus // shape.nodes - 1) * S
    inverse = load_number(memory, INVERSE, shape)
    best, best_key = tl.full((), -1, tl.int32), tl.full((), HIGHEST, tl.int32)
    bound, second, promising = _bound_swaps(memory, heaviest, top, shape)
    least = 2.0 * tl.minimum(floor, HIGHEST).to(tl.float32) * LESS
    start = tl.full((), 0, tl.int32)
    if tl.max(tl.maximum(bits(bound), 0), 0) < bits(least):
        start += S * OTHERS
    chosen = tl.full((), 1, tl.int1)  # first the most promising of each lane, then, if need be, all
    while start < S * OTHERS:
        at = tl.where(chosen, promising, tl.minimum(start + tl.arange(0, shape.lanes), S * OTHERS - 1))
        gain, key = _value_swaps(memory, heaviest, top, inverse, at, shape)
        found, found_key = largest(gain, key)
        better = (found > best) | ((found == best) & (found_key < best_key))
        best, best_key = tl.where(better, found, best), tl.where(better, found_key, best_key)
        if chosen:
            least = tl.maximum(least, 2.0 * best.to(tl.float32) * LESS)
            if tl.max(tl.maximum(bits(second), 0), 0) < bits(least):
                start += S * OTHERS
            chosen = tl.full((), 0, tl.int1)
        else:
            start += shape.lanes
    return best, best_key


@triton.jit
def _bound_swaps(memory, heaviest, top, shape: tl.constexpr):
    """Upper bounds of twice the gains: of each lane the largest and the second largest, and which swap has the first: i
    times the slots of other GPUs, plus the place among these."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = max(1, (D - 1) * S)
    PARTS: tl.constexpr = (S + AT_ONCE - 1) // AT_ONCE
    # by how much a score's root counts, and the sum, as parts of the top; less than one is cut off a score, and no more
    # than z by the root of half of an odd number
    inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), tl.maximum(top, 1).to(tl.float32)) * LESS
    of_root = inverse * (shape.z * 0.7071067811865475 * LESS)
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest).to(tl.float32)
    bound = tl.full((shape.lanes,), NO_BOUND, tl.float32)
    second = tl.full((shape.lanes,), NO_BOUND, tl.float32)
    promising = tl.zeros((shape.lanes,), tl.int32)
    start = 0
    while start < PARTS * (D - 1) * S:
        at = start + tl.arange(0, shape.lanes)
        inside = at < PARTS * (D - 1) * S
        part = tl.minimum(at // OTHERS, PARTS - 1)
        place = tl.minimum(at - part * OTHERS, OTHERS - 1)
        slot = heaviest // D * D * S + place
        slot += tl.where(slot >= heaviest * S, S, 0)
        partner = slot // S
        b = tl.load(memory.ints + shape.at.slot + slot)
        into_own = tl.load(memory.longs + shape.at.into_own + b)
        given = tl.load(memory.longs + shape.at.given + slot)
        b_sum = tl.load(memory.ints + shape.at.sum + b)
        its_sum = tl.load(memory.ints + shape.at.gpu_sum + partner)
        own_with = (own_sum + b_sum).to(tl.float32) * inverse - (shape.z + 2.0) * inverse
        its_without = (its_sum - b_sum).to(tl.float32) * inverse - (shape.z + 2.0) * inverse
        power = own_power + tl.load(memory.ints + shape.at.gpu_power + partner).to(tl.float32) + SLACK
        for also in tl.static_range(AT_ONCE):
            i = tl.minimum(part * AT_ONCE + also, S - 1)
            own = heaviest * S + i
            a_sum = tl.load(memory.ints + shape.at.sum + tl.load(memory.ints + shape.at.slot + own))
            mean = a_sum.to(tl.float32) * inverse
            both = tl.load(memory.longs + shape.at.product + i * E + b)
            own_variance = tl.load(memory.longs + shape.at.given + own) + into_own - both
            its_variance = tl.load(memory.longs + shape.at.into_partner + i * D + partner - heaviest // D * D)
            its_variance += given - both
            powers = _least_power(own_with - mean * GREATER, own_variance, of_root, shape)
            powers += _least_power(its_without + mean, its_variance, of_root, shape)
            sign = (own_variance >> 32).to(tl.int32) | (its_variance >> 32).to(tl.int32)
            allowed = inside & (sign >= 0) & (part * AT_ONCE + also < S)
            twice = tl.where(allowed, power - powers * WHOLE_POWER, NO_BOUND)
            second = tl.maximum(second, tl.minimum(bound, twice))
            promising = tl.where(twice > bound, i * OTHERS + place, promising)
            bound = tl.maximum(bound, twice)
        start += shape.lanes
    return bound, second, promising


@triton.jit
def _least_power(mean, variance, of_root, shape: tl.constexpr):
    """At most the power, a part of the top's, of a GPU with this sum, a part of the top, and this T * Q - M^2 + U, if
    that is not below 0; float32, of any that is above the top, too."""
    SQUARINGS: tl.constexpr = shape.squarings
    ratio = tl.maximum(mean + root_below(tl.maximum(variance.to(tl.float32), 0.0)) * of_root, 0.0)
    for _ in tl.static_range(SQUARINGS):
        ratio = ratio * ratio
    return ratio


@triton.jit
def _value_swaps(memory, heaviest, top, inverse, at, shape: tl.constexpr):
    """Gains a slot of swaps [lanes], -1 where not allowed, and their keys."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = max(1, (D - 1) * S)
    first_gpu = heaviest // D * D
    i = at // OTHERS
    own = heaviest * S + i
    slot = first_gpu * S + at - i * OTHERS
    slot += tl.where(slot >= heaviest * S, S, 0)
    partner = slot // S
    a, b = tl.load(memory.ints + shape.at.slot + own), tl.load(memory.ints + shape.at.slot + slot)
    both = tl.load(memory.longs + shape.at.product + i * E + b)
    own_variance = tl.load(memory.longs + shape.at.given + own) - both
    own_variance += tl.load(memory.longs + shape.at.into_own + b)
    its_variance = tl.load(memory.longs + shape.at.given + slot) - both
    its_variance += tl.load(memory.longs + shape.at.into_partner + i * D + partner - first_gpu)
    more = tl.load(memory.ints + shape.at.sum + b) - tl.load(memory.ints + shape.at.sum + a)
    own_score = score(tl.load(memory.ints + shape.at.gpu_sum + heaviest) + more, own_variance, shape)
    its_score = score(tl.load(memory.ints + shape.at.gpu_sum + partner) - more, its_variance, shape)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest)
    own_fall = own_power - power_of(own_score, top, inverse, shape)
    its_power = tl.load(memory.ints + shape.at.gpu_power + partner)
    its_fall = its_power - power_of(its_score, top, inverse, shape)
    # not below 0: nobody would hold an expert twice (h holds all of its own); above the top there is no gain
    allowed = (own_variance >= 0) & (its_variance >= 0) & (tl.maximum(own_score, its_score) <= top)
    half = (own_fall >> 1) + (its_fall >> 1) + (own_fall & its_fall & 1)  # of the sum, which may take 33 bits
    key = (partner - first_gpu) * S * S + i * S + slot - partner * S
    return tl.where(allowed, half, -1), key
