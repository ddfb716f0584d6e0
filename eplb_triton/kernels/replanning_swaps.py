"""Replanning, one step: the best swap. All are bounded in float32, what may be the best is valued exactly."""
# ruff: noqa: N803, N806, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, bits, divide, largest
from eplb_triton.kernels.replanning_bounds import GREATER, LESS, NO_BOUND, WHOLE_POWER, choose_promising, squared
from eplb_triton.kernels.replanning_history import sample_at
from eplb_triton.kernels.replanning_potential import (
    INVERSE,
    TOO_MUCH,
    add_product,
    floats_of,
    load_number,
    power_of,
    root_near,
    score,
    sum_of_squares,
)

ABOVE_TOP = tl.constexpr(0x7FFFFFFF)
"""In place of a power that no gain can come from."""
SLACK = tl.constexpr(1024.0)
"""Of twice a gain, below 2^31: its roundings are of 128, and powers are cut, by 2 * norm at most."""
MOST_AT_ONCE = tl.constexpr(9)
"""Slots of the heaviest GPU that a lane tries with one slot of another: with more, too many registers."""


@triton.jit(noinline=True)
def bound_swaps(memory, heaviest, top, shape: tl.constexpr):
    """memory.bound: of every swap of a slot of the heaviest GPU with one of another GPU of its node (bits);
    memory.promising: one of the largest of each few lanes. Returns the largest bound of the others (bits)."""
    bound, second, promising = _bound_swaps(memory, heaviest, top, shape)
    return choose_promising(memory, bound, second, promising, shape)


@triton.jit(noinline=True)
def find_swap(memory, samples, heaviest, top, rest, floor, rated, shape: tl.constexpr):
    """The best swap of a slot of the heaviest GPU with one of another GPU of its node: gain a slot, int32, and its key
    (partner, own slot, partner's slot). Ties: the lowest key. None gains more than `floor`: any gain up to it.

    rest: of `bound_swaps`. rated: what the promising ones lead to is in memory.swap_power, as of `value_changes`."""
    ROWS: tl.constexpr = shape.swap_rows
    # first the most promising of every few lanes, then, if need be, all that may gain as much
    num = tl.full((), ROWS, tl.int32)
    start = tl.full((), 0, tl.int32)
    if rated:
        place = tl.arange(0, ROWS)
        own_power = tl.load(memory.ints + shape.at.swap_power + place)
        its_power = tl.load(memory.ints + shape.at.swap_power + ROWS + place)
        at = tl.load(memory.ints + shape.at.promising + place)
        gain, key = _gains(memory, heaviest, at, own_power, its_power, shape)
        best, best_key = largest(gain, key)
    else:
        best, best_key = _value_swaps(memory, samples, heaviest, top, start, num, shape)
    least = tl.maximum(tl.minimum(floor, HIGHEST).to(tl.int32), best).to(tl.float32)
    least = bits(least * (2.0 / WHOLE_POWER * LESS))
    if rest >= least:
        num = _list_promising(memory, least, shape)
        while start < num:
            found, key = _value_swaps(memory, samples, heaviest, top, start, num, shape)
            better = (found > best) | ((found == best) & (key < best_key))
            best, best_key = tl.where(better, found, best), tl.where(better, key, best_key)
            start += ROWS
    return best, best_key


@triton.jit
def _list_promising(memory, least, shape: tl.constexpr):
    """memory.promising: swaps whose bound, memory.bound, has at least these bits. Returns how many."""
    D: tl.constexpr = shape.gpus // shape.nodes
    SWAPS: tl.constexpr = shape.slots * (D - 1) * shape.slots
    tl.debug_barrier()
    TILES: tl.constexpr = (SWAPS + shape.lanes - 1) // shape.lanes
    lane = tl.arange(0, shape.lanes)
    few = lane * 0
    for tile in tl.range(0, TILES, loop_unroll_factor=2):
        at = tile * shape.lanes + lane
        few += (tl.load(memory.ints + shape.at.bound + at, mask=at < SWAPS, other=-1) >= least).to(tl.int32)
    place = tl.cumsum(few, 0) - few
    for tile in tl.range(0, TILES, loop_unroll_factor=2):
        at = tile * shape.lanes + lane
        listed = tl.load(memory.ints + shape.at.bound + at, mask=at < SWAPS, other=-1) >= least
        tl.store(memory.ints + shape.at.promising + place, at, mask=listed)
        place += listed.to(tl.int32)
    num = tl.sum(few, 0)
    tl.debug_barrier()
    return num


@triton.jit
def _bound_swaps(memory, heaviest, top, shape: tl.constexpr):
    """Of upper bounds of twice the gains, as parts of the top's power: the largest and second largest of each lane
    (bits, 0 of a loss), and which swap has the largest: i times the slots of other GPUs, plus the place among these.
    memory.bound: of every swap (bits)."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = (D - 1) * S
    # what a slot of another GPU brings is looked up once: a lane tries it with all of the heaviest GPU's, if they are
    # few enough; with fewer of them those that fill no tile, as many as leave no lane idle
    TILED: tl.constexpr = OTHERS // shape.lanes * shape.lanes
    REST: tl.constexpr = OTHERS - TILED
    PARTS: tl.constexpr = (S + MOST_AT_ONCE - 1) // MOST_AT_ONCE
    ROOM: tl.constexpr = shape.lanes // REST if REST > 0 else 1
    SHARED: tl.constexpr = S if S < ROOM else ROOM
    REST_PARTS: tl.constexpr = SHARED if SHARED > PARTS else PARTS
    bound = tl.full((shape.lanes,), NO_BOUND, tl.float32)
    found = bound, bound, tl.full((shape.lanes,), 0, tl.int32)
    if TILED > 0:
        found = _bound_tiles(memory, heaviest, top, found, 0, TILED, PARTS, shape)
    if REST > 0:
        found = _bound_tiles(memory, heaviest, top, found, TILED, REST, REST_PARTS, shape)
    return tl.maximum(bits(found[0]), 0), tl.maximum(bits(found[1]), 0), found[2]


@triton.jit
def _bound_tiles(
    memory, heaviest, top, found, FIRST: tl.constexpr, NUM: tl.constexpr, PARTS: tl.constexpr, shape: tl.constexpr
):
    """`found`, as `_bound_swaps` returns it, by NUM slots of other GPUs more, from place FIRST on; a lane tries one of
    PARTS of the heaviest GPU's slots with each."""
    at = tl.arange(0, shape.lanes)
    if shape.lanes >= PARTS * NUM:
        found = _bound_tile(memory, heaviest, top, found, at, FIRST, NUM, PARTS, shape)
    else:
        start = 0
        while start < PARTS * NUM:
            found = _bound_tile(memory, heaviest, top, found, start + at, FIRST, NUM, PARTS, shape)
            start += shape.lanes
    return found


@triton.jit
def _bound_tile(
    memory,
    heaviest,
    top,
    found,
    at,
    FIRST: tl.constexpr,
    NUM: tl.constexpr,
    PARTS: tl.constexpr,
    shape: tl.constexpr,
):
    """As `_bound_tiles`: each lane the part and the slot that stand at place `at` of all."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = (D - 1) * S
    AT_ONCE: tl.constexpr = (S + PARTS - 1) // PARTS
    WHOLE: tl.constexpr = PARTS * AT_ONCE == S  # then the places of what is loaded differ by constants
    # by how much a score's root counts, and the sum, as parts of the top; less than one is cut off a score, and no more
    # than z by the root of half of an odd number
    inverse = divide(1.0, tl.maximum(top, 1)) * LESS
    floats = floats_of(memory)
    of_root = inverse * (shape.z * 0.7071067811865475 * LESS)
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest)
    top_power = tl.load(memory.ints + shape.at.gpu_power + heaviest).to(tl.float32)
    bound, second, promising = found
    inside = at < PARTS * NUM
    part = tl.minimum(at // NUM, PARTS - 1)
    place = FIRST + tl.minimum(at - part * NUM, NUM - 1)
    slot = _slot_of_other(heaviest, place, shape)
    partner = slot // S
    b = tl.load(memory.ints + shape.at.slot + slot)
    into_own = tl.load(floats + shape.at.into_own + b)
    given = tl.load(floats + shape.at.given + slot)
    b_sum = tl.load(memory.ints + shape.at.slot_sum + slot)
    its_sum = tl.load(memory.ints + shape.at.gpu_sum + partner)
    own_with = ((own_sum + b_sum).to(tl.float32) - (shape.z + 2.0)) * inverse
    its_without = ((its_sum - b_sum).to(tl.float32) - (shape.z + 2.0)) * inverse
    power = tl.load(memory.ints + shape.at.gpu_power + partner).to(tl.float32)
    power = (top_power + power + SLACK) * (1.0 / WHOLE_POWER)
    first = part * AT_ONCE
    first_swap = first * OTHERS + place
    own_place = heaviest * S + first
    product_ptr = floats + shape.at.product + first * E + b
    into_ptr = floats + shape.at.into_partner + first * D + partner % D
    made = ()
    for also in tl.static_range(AT_ONCE):
        i = also if WHOLE else tl.minimum(also, S - 1 - first)
        mean = tl.load(memory.ints + shape.at.slot_sum + own_place + i).to(tl.float32) * inverse
        both = tl.load(product_ptr + i * E)
        own_variance = tl.load(floats + shape.at.given + own_place + i) + into_own - both
        its_variance = tl.load(into_ptr + i * D) + given - both
        own_power = _least_power(add_product(own_with, mean, -GREATER), own_variance, of_root, shape)
        its_power = _least_power(its_without + mean, its_variance, of_root, shape)
        gains = tl.maximum(own_power, its_power) <= 1.0
        gains = gains & (inside if WHOLE else inside & (first + also < S))
        twice = tl.where(gains, power - own_power - its_power, NO_BOUND)
        made = made + (twice,)
        second = tl.maximum(second, tl.minimum(bound, twice))
        promising = tl.where(twice > bound, first_swap + i * OTHERS, promising)
        bound = tl.maximum(bound, twice)
    bound_ptr = floats + shape.at.bound + first_swap
    for also in tl.static_range(AT_ONCE):  # all are made before, as no load passes a store
        tl.store(bound_ptr + also * OTHERS, made[also], mask=inside if WHOLE else inside & (first + also < S))
    return bound, second, promising


@triton.jit
def _least_power(mean, variance, of_root, shape: tl.constexpr):
    """At most the power, a part of the top's, of a GPU with this sum, a part of the top, and at least this
    T * Q - M^2 + U; float32, of any that is above the top, too."""
    SQUARINGS: tl.constexpr = shape.squarings
    ratio = add_product(mean, root_near(tl.maximum(variance, 1.0)), of_root)
    if SQUARINGS < 3:  # else of a sum below 0, by less than z + 2 units of the top's 2^10 or more, nothing is left
        ratio = tl.maximum(ratio, 0.0)
    return squared(ratio, shape)


@triton.jit
def swap_at(heaviest, at, shape: tl.constexpr):
    """Own slot i, the other slot and its GPU of swap `at`: i times the slots of other GPUs of the node, plus the place
    of one among these."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    OTHERS: tl.constexpr = (D - 1) * S if D > 1 else 1
    i = at // OTHERS
    slot = _slot_of_other(heaviest, at - i * OTHERS, shape)
    return i, slot, slot // S


@triton.jit
def _slot_of_other(heaviest, place, shape: tl.constexpr):
    """The slot at this place among those of the node's GPUs but the heaviest."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    slot = heaviest // D * D * S + place
    return slot + tl.where(slot >= heaviest * S, S, 0)


@triton.jit
def _gains(memory, heaviest, at, own_power, its_power, shape: tl.constexpr):
    """Gains a slot of swaps [rows], -1 where not allowed, and their keys; the powers of both GPUs after a swap, int32,
    ABOVE_TOP where a score is."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    i, slot, partner = swap_at(heaviest, at, shape)
    b = tl.load(memory.ints + shape.at.slot + slot)
    # h holds all of its own: none of them is taken twice
    floats = floats_of(memory)
    banned = tl.load(floats + shape.at.into_own + b) == TOO_MUCH
    banned = banned | (tl.load(floats + shape.at.into_partner + i * D + partner % D) == TOO_MUCH)
    own_fall = tl.load(memory.ints + shape.at.gpu_power + heaviest) - own_power
    its_fall = tl.load(memory.ints + shape.at.gpu_power + partner) - its_power
    half = (own_fall >> 1) + (its_fall >> 1) + (own_fall & its_fall & 1)  # of the sum, which may take 33 bits
    allowed = (banned == 0) & (tl.maximum(own_power, its_power) < ABOVE_TOP)  # above the top there is no gain
    return tl.where(allowed, half, -1), partner % D * S * S + i * S + slot - partner * S


@triton.jit(noinline=True)
def _value_swaps(memory, samples, heaviest, top, start, num, shape: tl.constexpr):
    """The best of the first `num` of memory.promising, from place `start` on, as many as there are rows: as
    `find_swap` returns it."""
    inverse = load_number(memory, INVERSE, shape)
    at = tl.load(memory.ints + shape.at.promising + tl.minimum(start + tl.arange(0, shape.swap_rows), num - 1))
    i, slot, partner = swap_at(heaviest, at, shape)
    a = tl.load(memory.ints + shape.at.slot + heaviest * shape.slots + i)
    b = tl.load(memory.ints + shape.at.slot + slot)
    t = tl.arange(0, shape.row)[None, :]
    level_ptr, load_ptr = memory.ints + shape.at.level, memory.ints + shape.at.gpu_load
    more = tl.load(level_ptr + sample_at(b[:, None], t, shape.experts, shape))
    more -= tl.load(level_ptr + sample_at(a[:, None], t, shape.experts, shape))
    own_square = sum_of_squares(tl.load(load_ptr + sample_at(heaviest, t, shape.gpus, shape)) + more)
    its_square = sum_of_squares(tl.load(load_ptr + sample_at(partner[:, None], t, shape.gpus, shape)) - more)
    more_sum = tl.load(memory.ints + shape.at.sum + b) - tl.load(memory.ints + shape.at.sum + a)
    more_spread = tl.load(memory.longs + shape.at.spread + b) - tl.load(memory.longs + shape.at.spread + a)
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest) + more_sum
    its_sum = tl.load(memory.ints + shape.at.gpu_sum + partner) - more_sum
    own_spread = tl.load(memory.longs + shape.at.gpu_spread + heaviest) + more_spread
    its_spread = tl.load(memory.longs + shape.at.gpu_spread + partner) - more_spread
    own_score = score(own_sum, samples * own_square - own_sum.to(tl.int64) * own_sum + own_spread, shape)
    its_score = score(its_sum, samples * its_square - its_sum.to(tl.int64) * its_sum + its_spread, shape)
    own_power = tl.where(own_score > top, ABOVE_TOP, power_of(own_score, top, inverse, shape))
    its_power = tl.where(its_score > top, ABOVE_TOP, power_of(its_score, top, inverse, shape))
    gain, key = _gains(memory, heaviest, at, own_power, its_power, shape)
    return largest(gain, key)
