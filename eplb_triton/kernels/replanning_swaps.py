"""Replanning, one step: the best swap. All are bounded in float32, what may be the best is valued exactly.

A bound is never below the gain: variances, scores and powers are taken for less than they are, by 2^-20 or more where
some operations are rounded. Which swaps are valued exactly depends on it and on nothing else: what is found does not.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import HIGHEST, bits, from_bits, largest
from eplb_triton.kernels.replanning_potential import INVERSE, load_number, power_of, root_near, score

LESS = tl.constexpr(1.0 - 2.0**-20)
"""Float32 roundings, of 2^-24 each: there are at most eight where this is taken off, or one and a root's 2^-22."""
GREATER = tl.constexpr(1.0 + 2.0**-18)
"""Of a sum that is taken off: more than twice what `LESS` makes of it."""
WHOLE_POWER = tl.constexpr(2.0**constants.POWER_BITS)
NO_BOUND = tl.constexpr(-(2.0**40))
"""Of no swap. One that is not allowed has a variance of `TOO_MUCH`, and about this bound; where z is 0 it has one like
the others, and may be valued for nothing."""
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
    second, promising = _bound_swaps(memory, heaviest, top, shape)
    least = tl.minimum(floor, HIGHEST).to(tl.float32)
    start = tl.full((), 0, tl.int32)
    chosen = tl.full((), 1, tl.int1)  # first the most promising of each lane, then, if need be, all
    while start < S * OTHERS:
        at = tl.where(chosen, promising, tl.minimum(start + tl.arange(0, shape.lanes), S * OTHERS - 1))
        gain, key = _value_swaps(memory, heaviest, top, inverse, at, shape)
        found, found_key = largest(gain, key)
        better = (found > best) | ((found == best) & (found_key < best_key))
        best, best_key = tl.where(better, found, best), tl.where(better, found_key, best_key)
        if chosen:
            least = tl.maximum(least, best.to(tl.float32)) * (2.0 / WHOLE_POWER * LESS)
            if tl.max(tl.maximum(bits(second), 0), 0) < bits(least):
                start += S * OTHERS
            chosen = tl.full((), 0, tl.int1)
        else:
            start += shape.lanes
    return best, best_key


@triton.jit
def _bound_swaps(memory, heaviest, top, shape: tl.constexpr):
    """Of upper bounds of twice the gains, as parts of the top's power: the second largest of each lane, and which swap
    has the largest: i times the slots of other GPUs, plus the place among these."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = (D - 1) * S if D > 1 else 1
    PARTS: tl.constexpr = (S + AT_ONCE - 1) // AT_ONCE
    WHOLE: tl.constexpr = PARTS * AT_ONCE == S  # then the places of what is loaded differ by constants
    # by how much a score's root counts, and the sum, as parts of the top; less than one is cut off a score, and no more
    # than z by the root of half of an odd number
    inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), tl.maximum(top, 1).to(tl.float32)) * LESS
    of_root = inverse * (shape.z * 0.7071067811865475 * LESS)
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest)
    bound = tl.full((shape.lanes,), NO_BOUND, tl.float32)
    second = tl.full((shape.lanes,), NO_BOUND, tl.float32)
    promising = tl.full((shape.lanes,), 0, tl.int32)
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
        into_own = from_bits(tl.load(memory.ints + shape.at.into_own_below + b))
        given = from_bits(tl.load(memory.ints + shape.at.given_below + slot))
        b_sum = tl.load(memory.ints + shape.at.slot_sum + slot)
        its_sum = tl.load(memory.ints + shape.at.gpu_sum + partner)
        own_with = ((own_sum + b_sum).to(tl.float32) - (shape.z + 2.0)) * inverse
        its_without = ((its_sum - b_sum).to(tl.float32) - (shape.z + 2.0)) * inverse
        powers = own_power.to(tl.float32) + tl.load(memory.ints + shape.at.gpu_power + partner).to(tl.float32)
        power = (powers + SLACK) * (1.0 / WHOLE_POWER)
        first = part * AT_ONCE
        its_place = partner - heaviest // D * D
        for also in tl.static_range(AT_ONCE):
            i = first + also if WHOLE else tl.minimum(first + also, S - 1)
            own = heaviest * S + i
            mean = tl.load(memory.ints + shape.at.slot_sum + own).to(tl.float32) * inverse
            both = from_bits(tl.load(memory.ints + shape.at.product_near + i * E + b))
            own_variance = from_bits(tl.load(memory.ints + shape.at.given_below + own)) + into_own - both
            its_variance = from_bits(tl.load(memory.ints + shape.at.into_partner_below + i * D + its_place))
            its_variance = its_variance + given - both
            left = power - _least_power(own_with - mean * GREATER, own_variance, of_root, shape)
            twice = left - _least_power(its_without + mean, its_variance, of_root, shape)
            twice = tl.where(inside & (WHOLE | (first + also < S)), twice, NO_BOUND)
            second = tl.maximum(second, tl.minimum(bound, twice))
            promising = tl.where(twice > bound, i * OTHERS + place, promising)
            bound = tl.maximum(bound, twice)
        start += shape.lanes
    return second, promising


@triton.jit
def _least_power(mean, variance, of_root, shape: tl.constexpr):
    """At most the power, a part of the top's, of a GPU with this sum, a part of the top, and at least this
    T * Q - M^2 + U; float32, of any that is above the top, too."""
    SQUARINGS: tl.constexpr = shape.squarings
    ratio = mean + root_near(tl.maximum(variance, 1.0)) * of_root
    if SQUARINGS < 3:  # else of a sum below 0, by less than z + 2 units of the top's 2^10 or more, nothing is left
        ratio = tl.maximum(ratio, 0.0)
    for _ in tl.static_range(SQUARINGS):
        ratio = ratio * ratio
    return ratio


@triton.jit
def _value_swaps(memory, heaviest, top, inverse, at, shape: tl.constexpr):
    """Gains a slot of swaps [lanes], -1 where not allowed, and their keys."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = (D - 1) * S if D > 1 else 1
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
