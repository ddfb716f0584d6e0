"""Replanning, one step: the best swap. All are bounded in float32, what may be the best is valued exactly.

A bound is never below the gain: scores and powers are taken for less than they are, by 2^-20 a rounded operation and
two Newton steps of a root, which come from below. One swap in ten thousand then has a bound above the best gain.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, bits, from_bits, largest
from eplb_triton.kernels.replanning_potential import inverse_of_top, power_of, score

LESS = tl.constexpr(1.0 - 2.0**-20)
"""Four float32 roundings and what is left of a root; there are at most eight, of 2^-24 each."""
ROOT_BITS = tl.constexpr(0x5F3759DF)
"""Of which half the bits of x are taken for a number within 4 % of 1 / sqrt(x)."""
NO_BOUND = tl.constexpr(-(2.0**40))
"""Of swaps that are not allowed: all others' bounds of twice the gain are above, or below 0 by far."""
SLACK = tl.constexpr(1024.0)
"""Of twice a gain, below 2^31: its roundings are of 128, and powers are cut, by 2 * norm at most."""


@triton.jit(noinline=True)
def find_swap(memory, heaviest, top, floor, shape: tl.constexpr):
    """The best swap of a slot of the heaviest GPU with one of another GPU of its node: gain a slot, int32, and its key
    (partner, own slot, partner's slot). Ties: the lowest key. None gains more than `floor`: any gain up to it."""
    S: tl.constexpr = shape.slots
    COUNT: tl.constexpr = (shape.gpus // shape.nodes - 1) * S * S
    inverse = inverse_of_top(top)
    best, best_key = tl.full((), -1, tl.int32), tl.full((), HIGHEST, tl.int32)
    bound, second, promising = _bound_swaps(memory, heaviest, top, shape)
    least = 2.0 * tl.minimum(floor, HIGHEST).to(tl.float32) * LESS
    start = tl.full((), 0, tl.int32)
    if tl.max(tl.maximum(bits(bound), 0), 0) < bits(least):
        start += COUNT
    chosen = tl.full((), 1, tl.int1)  # first the most promising of each lane, then, if need be, all
    while start < COUNT:
        at = tl.where(chosen, promising, tl.minimum(start + tl.arange(0, shape.candidates), COUNT - 1))
        gain, key = _value_swaps(memory, heaviest, top, inverse, at, shape)
        found, found_key = largest(gain, key)
        better = (found > best) | ((found == best) & (found_key < best_key))
        best, best_key = tl.where(better, found, best), tl.where(better, found_key, best_key)
        if chosen:
            least = tl.maximum(least, 2.0 * best.to(tl.float32) * LESS)
            if tl.max(tl.maximum(bits(second), 0), 0) < bits(least):
                start += COUNT
            chosen = tl.full((), 0, tl.int1)
        else:
            start += shape.candidates
    return best, best_key


@triton.jit
def _swap_at(memory, heaviest, at, shape: tl.constexpr):
    """Slot i of the heaviest GPU h, the partner's slot, and the partner, of a swap; what h and the partner will have,
    of T * Q - M^2 + U; by how much h's sum grows."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = max(1, (D - 1) * S)
    i = at // OTHERS
    own = heaviest * S + i
    slot = heaviest // D * D * S + at - i * OTHERS
    slot += tl.where(slot >= heaviest * S, S, 0)
    partner = slot // S
    a, b = tl.load(memory.ints + shape.at.slot + own), tl.load(memory.ints + shape.at.slot + slot)
    both = tl.load(memory.longs + shape.at.product + i * E + b)
    own_variance = tl.load(memory.longs + shape.at.given + own) - both
    own_variance += tl.load(memory.longs + shape.at.into_own + b)
    its_variance = tl.load(memory.longs + shape.at.given + slot) - both
    its_variance += tl.load(memory.longs + shape.at.into_partner + i * D + partner - heaviest // D * D)
    more = tl.load(memory.ints + shape.at.sum + b) - tl.load(memory.ints + shape.at.sum + a)
    return i, slot, partner, own_variance, its_variance, more


@triton.jit
def _bound_swaps(memory, heaviest, top, shape: tl.constexpr):
    """Upper bounds of twice the gains: of each lane the largest and the second largest, and which swap has the first."""
    S: tl.constexpr = shape.slots
    COUNT: tl.constexpr = (shape.gpus // shape.nodes - 1) * S * S
    inverse = tl.math.div_rn(tl.full((), 1.0, tl.float32), tl.maximum(top, 1).to(tl.float32)) * LESS
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest).to(tl.float32)
    bound = tl.full((shape.candidates,), NO_BOUND, tl.float32)
    second = tl.full((shape.candidates,), NO_BOUND, tl.float32)
    promising = tl.zeros((shape.candidates,), tl.int32)
    start = 0
    while start < COUNT:
        at = start + tl.arange(0, shape.candidates)
        inside = at < COUNT
        at = tl.minimum(at, COUNT - 1)
        i, slot, partner, own_variance, its_variance, more = _swap_at(memory, heaviest, at, shape)
        its_sum = tl.load(memory.ints + shape.at.gpu_sum + partner)
        its_power = tl.load(memory.ints + shape.at.gpu_power + partner).to(tl.float32)
        powers = _least_power(own_sum + more, own_variance, inverse, shape)
        powers += _least_power(its_sum - more, its_variance, inverse, shape)
        allowed = inside & (own_variance >= 0) & (its_variance >= 0)
        twice = tl.where(allowed, own_power + its_power - powers + SLACK, NO_BOUND)
        second = tl.maximum(second, tl.minimum(bound, twice))
        promising = tl.where(twice > bound, at, promising)
        bound = tl.maximum(bound, twice)
        start += shape.candidates
    return bound, second, promising


@triton.jit
def _least_power(mean, variance, inverse, shape: tl.constexpr):
    """At most the power of a GPU with this sum and this T * Q - M^2 + U; float32, of any that is above the top, too."""
    SQUARINGS: tl.constexpr = shape.squarings
    # the root of half of it, less one for what is cut off in it and one in the score
    x = tl.maximum(variance, 0).to(tl.float32)
    root = from_bits(-(bits(x) >> 1) + ROOT_BITS)
    half = 0.5 * x
    root = root * (1.5 - half * root * root)
    root = root * (1.5 - half * root * root)
    low = mean.to(tl.float32) + x * root * (shape.z * 0.7071067811865475 * LESS) - (shape.z + 2.0)
    ratio = tl.maximum(low * inverse, 0.0)
    for _ in tl.static_range(SQUARINGS):
        ratio = ratio * ratio
    return ratio * 1073741824.0  # 2^POWER_BITS


@triton.jit
def _value_swaps(memory, heaviest, top, inverse, at, shape: tl.constexpr):
    """Gains a slot of swaps [lanes], -1 where not allowed, and their keys."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    i, slot, partner, own_variance, its_variance, more = _swap_at(memory, heaviest, at, shape)
    own_score = score(tl.load(memory.ints + shape.at.gpu_sum + heaviest) + more, own_variance, shape)
    its_score = score(tl.load(memory.ints + shape.at.gpu_sum + partner) - more, its_variance, shape)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest)
    own_fall = own_power - power_of(own_score, top, inverse, shape)
    its_power = tl.load(memory.ints + shape.at.gpu_power + partner)
    its_fall = its_power - power_of(its_score, top, inverse, shape)
    # not below 0: nobody would hold an expert twice (h holds all of its own); above the top there is no gain
    allowed = (own_variance >= 0) & (its_variance >= 0) & (tl.maximum(own_score, its_score) <= top)
    half = (own_fall >> 1) + (its_fall >> 1) + (own_fall & its_fall & 1)  # of the sum, which may take 33 bits
    first_gpu = heaviest // D * D
    key = (partner - first_gpu) * S * S + i * S + slot - partner * S
    return tl.where(allowed, half, -1), key
