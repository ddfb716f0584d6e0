"""Replanning, scores: the load to expect of every GPU's busiest step, and one number for a whole placement."""
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


@triton.jit(noinline=True)
def divide_loads(memory, samples, first, apart, num, shape: tl.constexpr):
    """Loads of a replica of experts first, first + apart, ... (`num` of them): as many replicas as there are, one fewer
    and one more, with their sums and spreads over the samples."""
    E: tl.constexpr = shape.experts
    start = 0
    while start < num:
        at = start + tl.arange(0, shape.lanes)
        inside = at < num
        expert = first + at * apart
        count = tl.load(memory.ints + shape.at.count + expert, mask=inside, other=1)
        for change in tl.static_range(3):  # replicas: as they are, one fewer, one more
            replicas = tl.maximum(count + (0, -1, 1)[change], 1).to(tl.float32)
            level, sums = memory.ints + shape.at.level + change * (shape.samples * E), change * E + expert
            added = tl.zeros((shape.lanes,), tl.int32)
            squares = tl.zeros((shape.lanes,), tl.int64)
            for t in tl.range(0, shape.samples, loop_unroll_factor=4):
                load = tl.load(memory.ints + shape.at.sample + t * E + expert, mask=inside, other=0)
                # below 2^22, at least 2^-22 below the next whole number, which float32's rounding cannot reach
                each = tl.math.div_rn(load.to(tl.float32), replicas).to(tl.int32)
                tl.store(level + t * E + expert, each, mask=inside)
                added += each
                squares += each.to(tl.int64) * each
            tl.store(memory.ints + shape.at.sum + sums, added, mask=inside)
            tl.store(memory.longs + shape.at.square + sums, squares, mask=inside)
            tl.store(memory.longs + shape.at.spread + sums, samples * squares - added.to(tl.int64) * added, mask=inside)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def add_up_gpus(memory, samples, shape: tl.constexpr):
    """Of every GPU, from its slots: loads in every sample, their sum M, the spreads U, and T * Q + U."""
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus
    S: tl.constexpr = shape.slots
    start = 0
    while start < shape.samples * D:
        at = start + tl.arange(0, shape.lanes)
        inside = at < shape.samples * D
        t, gpu = at // D, at % D
        load = tl.zeros((shape.lanes,), tl.int32)
        for j in tl.range(0, S):
            expert = tl.load(memory.ints + shape.at.slot + gpu * S + j, mask=inside, other=0)
            load += tl.load(memory.ints + shape.at.level + t * E + expert, mask=inside, other=0)
        tl.store(memory.ints + shape.at.gpu_load + at, load, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < shape.replicas:  # products of each slot with its own GPU: they add up to Q
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        product = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.samples, loop_unroll_factor=8):
            load = tl.load(memory.ints + shape.at.gpu_load + t * D + slot // S, mask=inside, other=0)
            product += load.to(tl.int64) * tl.load(memory.ints + shape.at.level + t * E + expert, mask=inside, other=0)
        tl.store(memory.longs + shape.at.own_product + slot, product, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    gpu = tl.arange(0, shape.gpu_lanes)
    inside = gpu < D
    mean = tl.zeros((shape.gpu_lanes,), tl.int32)
    square = tl.zeros((shape.gpu_lanes,), tl.int64)
    spread = tl.zeros((shape.gpu_lanes,), tl.int64)
    for j in tl.range(0, S):
        slot = gpu * S + j
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        mean += tl.load(memory.ints + shape.at.sum + expert, mask=inside, other=0)
        square += tl.load(memory.longs + shape.at.own_product + slot, mask=inside, other=0)
        spread += tl.load(memory.longs + shape.at.spread + expert, mask=inside, other=0)
    tl.store(memory.ints + shape.at.gpu_sum + gpu, mean, mask=inside)
    tl.store(memory.longs + shape.at.gpu_spread + gpu, spread, mask=inside)
    tl.store(memory.longs + shape.at.gpu_bend + gpu, samples * square + spread, mask=inside)
    tl.debug_barrier()


@triton.jit(noinline=True)
def rate_gpus(memory, shape: tl.constexpr):
    """The power of every GPU, the one of largest score, that score, and the potential F. Ties: lowest index."""
    gpu = tl.arange(0, shape.gpu_lanes)
    inside = gpu < shape.gpus
    mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
    bend = tl.load(memory.longs + shape.at.gpu_bend + gpu, mask=inside, other=0)
    scores = tl.where(inside, score(mean, bend, shape), -1)
    top, heaviest = largest(scores, gpu)
    power = tl.where(inside, power_of(tl.maximum(scores, 0), top, inverse_of_top(top), shape), 0)
    tl.store(memory.longs + shape.at.gpu_power + gpu, power, mask=inside)
    potential = tl.sum(power, 0)
    tl.debug_barrier()
    return heaviest, top, potential


@triton.jit
def score(mean, bend, shape: tl.constexpr):
    """M + trunc(z * sqrt(max(T * Q + U - M^2, 0) >> 1)), int32, of the sum M (int32) and T * Q + U (int64)."""
    variance = tl.maximum(bend - mean.to(tl.int64) * mean, 0) >> 1
    return mean + (float64(shape.z) * tl.sqrt(variance.to(tl.float64))).to(tl.int32)


@triton.jit
def inverse_of_top(top):
    """2^30 / top as `power_of` wants it."""
    return inverse_of(top) * float64(2.0**30)


@triton.jit
def power_of(scores, top, inverse, shape: tl.constexpr):
    """(score / top)^norm with 30 bits after the point, int64; POWER_LIMIT of a score above `top`."""
    SQUARINGS: tl.constexpr = shape.squarings
    low = tl.minimum(scores, top)
    ratio = (low.to(tl.float64) * inverse).to(tl.int32)  # at most 1 too low, as in `quotient`
    rest = (low.to(tl.int64) << POWER_BITS) - ratio.to(tl.int64) * top
    ratio += (rest >= top).to(tl.int32)
    for _ in tl.static_range(SQUARINGS):
        ratio = ((ratio.to(tl.int64) * ratio) >> POWER_BITS).to(tl.int32)
    return tl.where(scores > top, POWER_LIMIT, ratio.to(tl.int64))


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
