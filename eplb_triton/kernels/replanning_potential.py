"""Replanning, scores: the load to expect of every GPU's busiest step, and one number for a whole placement."""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import float64, largest
from eplb_triton.kernels.replanning_history import UNITS, inverse_of

POWER_BITS = tl.constexpr(30)
"""A score equal to the largest has the power 2^30."""
POWER_LIMIT = tl.constexpr(1 << 46)
"""Power of a score above the largest."""
MOST_FLOOR = tl.constexpr(2.0**62)


@triton.jit
def sample_rows(first_ptr, row, shape: tl.constexpr):
    """Pointers [lanes, together] to the beginnings of rows of samples."""
    return first_ptr + row[:, None] * shape.row + tl.arange(0, shape.together)[None, :]


@triton.jit
def total_loads(memory, expert, shape: tl.constexpr):
    """Sums over the samples of the loads (int32) and of their squares (int64) of experts [lanes]."""
    added, squares = expert * 0, (expert * 0).to(tl.int64)
    sample_ptr = sample_rows(memory.ints + shape.at.sample, expert, shape)
    for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
        load = tl.load(sample_ptr + t)
        added += tl.sum(load, 1)
        squares += tl.sum(load.to(tl.int64) * load, 1)
    return added, squares


@triton.jit(noinline=True)
def divide_loads(memory, samples, first, apart, num, shape: tl.constexpr):
    """Loads of a replica of experts first, first + apart, ... (`num` of them): memory.level of as many replicas as
    there are, of one fewer and of one more, with their sums and spreads over the samples."""
    E: tl.constexpr = shape.experts
    start = 0
    while start < 3 * num * shape.row:
        at = start + tl.arange(0, shape.lanes)
        inside = at < 3 * num * shape.row
        change, t = at // shape.row % 3, at % shape.row
        expert = first + tl.minimum(at // (3 * shape.row), num - 1) * apart
        replicas = tl.load(memory.ints + shape.at.count + expert)
        replicas += tl.where(change == 1, -1, tl.where(change == 2, 1, 0))
        load = tl.load(memory.ints + shape.at.sample + expert * shape.row + t)
        # below 2^22, so at least 2^-22 below the next whole number, which float32's rounding cannot reach
        each = tl.math.div_rn(load.to(tl.float32), tl.maximum(replicas, 1).to(tl.float32)).to(tl.int32)
        tl.store(memory.ints + shape.at.level + (change * E + expert) * shape.row + t, each, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < 3 * num:
        at = start + tl.arange(0, shape.lanes)
        one = tl.minimum(at, 3 * num - 1)
        row = one % 3 * E + first + one // 3 * apart
        level_ptr = sample_rows(memory.ints + shape.at.level, row, shape)
        added = tl.zeros((shape.lanes,), tl.int32)
        squares = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
            load = tl.load(level_ptr + t)
            added += tl.sum(load, 1)
            squares += tl.sum(load.to(tl.int64) * load, 1)
        tl.store(memory.ints + shape.at.sum + row, added, mask=at < 3 * num)
        tl.store(memory.longs + shape.at.square + row, squares, mask=at < 3 * num)
        spread = samples * squares - added.to(tl.int64) * added
        tl.store(memory.longs + shape.at.spread + row, spread, mask=at < 3 * num)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def add_up_gpus(memory, samples, num, shape: tl.constexpr):
    """Of the first `num` GPUs of memory.changed, from their slots: loads in every sample, their sum M, the spreads U,
    and T * Q + U; of their slots the products with their GPU, which add up to Q, and memory.times."""
    S: tl.constexpr = shape.slots
    T: tl.constexpr = shape.row
    start = 0
    while start < num * T:
        at = tl.minimum(start + tl.arange(0, shape.lanes), num * T - 1)
        gpu, t = tl.load(memory.ints + shape.at.changed + at // T), at % T
        load = tl.zeros((shape.lanes,), tl.int32)
        for j in tl.range(0, S, loop_unroll_factor=4):
            expert = tl.load(memory.ints + shape.at.slot + gpu * S + j)
            load += tl.load(memory.ints + shape.at.level + expert * T + t)
        tl.store(memory.ints + shape.at.gpu_load + gpu * T + t, load)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < num * S:
        at = tl.minimum(start + tl.arange(0, shape.lanes), num * S - 1)
        gpu, slot_of_gpu = tl.load(memory.ints + shape.at.changed + at // S), at % S
        slot = gpu * S + slot_of_gpu
        expert = tl.load(memory.ints + shape.at.slot + slot)
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        level_ptr = sample_rows(memory.ints + shape.at.level, expert, shape)
        product = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, T, shape.together, loop_unroll_factor=2):
            product += tl.sum(tl.load(load_ptr + t).to(tl.int64) * tl.load(level_ptr + t), 1)
        tl.store(memory.longs + shape.at.own_product + slot, product)
        times = tl.zeros((shape.lanes,), tl.int32)
        earlier = at < 0
        for j in tl.range(0, S, loop_unroll_factor=4):
            equal = tl.load(memory.ints + shape.at.slot + gpu * S + j) == expert
            times += equal.to(tl.int32)
            earlier = earlier | (equal & (slot_of_gpu > j))
        tl.store(memory.ints + shape.at.times + slot, tl.where(earlier, 0, times))
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < num:
        gpu = tl.load(memory.ints + shape.at.changed + tl.minimum(start + tl.arange(0, shape.lanes), num - 1))
        mean = tl.zeros((shape.lanes,), tl.int32)
        square = tl.zeros((shape.lanes,), tl.int64)
        spread = tl.zeros((shape.lanes,), tl.int64)
        for j in tl.range(0, S, loop_unroll_factor=4):
            slot = gpu * S + j
            expert = tl.load(memory.ints + shape.at.slot + slot)
            mean += tl.load(memory.ints + shape.at.sum + expert)
            square += tl.load(memory.longs + shape.at.own_product + slot)
            spread += tl.load(memory.longs + shape.at.spread + expert)
        tl.store(memory.ints + shape.at.gpu_sum + gpu, mean)
        tl.store(memory.longs + shape.at.gpu_spread + gpu, spread)
        tl.store(memory.longs + shape.at.gpu_bend + gpu, samples * square + spread)
        start += shape.lanes
    tl.debug_barrier()


PRICE = tl.constexpr(0)
PEAK = tl.constexpr(1)
"""Places in memory.numbers: what a written slot must save in this search, and J of the placement as it is."""


@triton.jit(noinline=True)
def rate_gpus(memory, shape: tl.constexpr):
    """memory.gpu_power of every GPU. Returns the one of largest score, that score, and what a step must gain more than.
    J goes to memory.numbers. Ties: lowest index."""
    gpu = tl.arange(0, shape.gpu_lanes)
    inside = gpu < shape.gpus
    mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
    bend = tl.load(memory.longs + shape.at.gpu_bend + gpu, mask=inside, other=0)
    scores = tl.where(inside, score(mean, bend, shape), -1)
    top, heaviest = largest(scores, gpu)
    power = tl.where(inside, power_of(scores, top, inverse_of_top(top), shape), 0)
    tl.store(memory.ints + shape.at.gpu_power + gpu, power, mask=inside)
    potential = tl.sum(power.to(tl.int64), 0)
    peak = predicted_peak(top, potential, shape)
    floor = least_gain(load_number(memory, PRICE, shape), peak, potential, shape)
    store_number(memory, PEAK, peak, shape)
    tl.debug_barrier()
    return heaviest, top, floor


@triton.jit
def load_number(memory, place, shape: tl.constexpr):
    """A float64 of memory.numbers."""
    return tl.load(memory.longs + shape.at.numbers + place).to(tl.float64, bitcast=True)


@triton.jit
def store_number(memory, place, number, shape: tl.constexpr):
    tl.store(memory.longs + shape.at.numbers + place, number.to(tl.int64, bitcast=True))


@triton.jit
def score(mean, bend, shape: tl.constexpr):
    """M + trunc(z * sqrt((T * Q + U - M^2) >> 1)), int32, of the sum M (int32) and T * Q + U (int64).

    By Cauchy and Schwarz T * Q is at least M^2, and the spreads in U are at least 0: nothing to be cut off. Unsigned
    and by way of int64, so that NO_GAIN in place of a sum gives some number, which is not looked at."""
    variance = (bend - mean.to(tl.int64) * mean).to(tl.uint64) >> 1
    return mean + (float64(shape.z) * tl.sqrt(variance.to(tl.float64))).to(tl.int64).to(tl.int32)


@triton.jit
def inverse_of_top(top):
    """2^30 / top as `power_of` wants it."""
    return inverse_of(top) * float64(2.0**30)


@triton.jit
def power_of(scores, top, inverse, shape: tl.constexpr):
    """(score / top)^norm with 30 bits after the point, int32, of scores up to `top`."""
    SQUARINGS: tl.constexpr = shape.squarings
    low = tl.maximum(tl.minimum(scores, top), 0)
    ratio = (low.to(tl.float64) * inverse).to(tl.int32)  # at most 1 too low, as in `quotient`
    rest = (low << POWER_BITS) - ratio * top  # below 2 * top: its lower 32 bits are all of it
    ratio += (rest >= top).to(tl.int32)
    twice = ratio.to(tl.uint32) * 2
    for _ in tl.static_range(SQUARINGS):
        twice = tl.umulhi(twice, twice) * 2  # (2 * r)^2 / 2^32 is r^2 / 2^30
    return (twice // 2).to(tl.int32)


@triton.jit
def power_or_limit(scores, top, inverse, shape: tl.constexpr):
    """`power_of` of any scores, int64: POWER_LIMIT above `top`."""
    return tl.where(scores > top, POWER_LIMIT, power_of(scores, top, inverse, shape).to(tl.int64))


@triton.jit
def predicted_peak(top, potential, shape: tl.constexpr):
    """J = top * (F / (D * 2^30))^(1 / norm), float64, by square roots."""
    SQUARINGS: tl.constexpr = shape.squarings
    root = potential.to(tl.float64) / float64(shape.gpus * 2.0**30)
    for _ in tl.static_range(SQUARINGS):
        root = tl.sqrt(root)
    return top.to(tl.float64) * root


@triton.jit
def price_of_slot(price, samples, shape: tl.constexpr):
    """The price in units of the samples: price * (T * UNITS / D), float64."""
    return price * ((samples * UNITS).to(tl.float64) / float64(shape.gpus))


@triton.jit
def least_gain(slot_price, peak, potential, shape: tl.constexpr):
    """What a step must gain more than, a written slot, in units of the potential: int64."""
    floor = slot_price * float64(2.0**shape.squarings) * potential.to(tl.float64) / peak
    return tl.minimum(tl.maximum(floor, float64(1.0)), float64(MOST_FLOOR)).to(tl.int64)
