"""Replanning, scores: the load to expect of every GPU's busiest step, and one number for a whole placement."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import float64, largest
from eplb_triton.kernels.replanning_history import LOAD_UNITS, inverse_of

POWER_BITS = tl.constexpr(constants.POWER_BITS)
POWER_LIMIT = tl.constexpr(constants.POWER_LIMIT)
MOST_FLOOR = tl.constexpr(constants.MOST_FLOOR)
NO_GAIN = tl.constexpr(-(1 << 62))


@triton.jit
def sample_rows(first_ptr, row, shape: tl.constexpr):
    """Pointers [lanes, together] to the first samples of rows; the next ones of all rows lie behind those of all rows,
    so that lanes with rows side by side load side by side."""
    return first_ptr + row[:, None] * shape.together + tl.arange(0, shape.together)[None, :]


@triton.jit
def inner_product(one_ptr, ONE_ROWS: tl.constexpr, other_ptr, OTHER_ROWS: tl.constexpr, shape: tl.constexpr):
    """Sums over the samples of products, int64 [lanes], of two rows a lane (pointers of `sample_rows`)."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    products = tl.load(one_ptr).to(tl.int64) * tl.load(other_ptr)
    for t in tl.static_range(STEP, ROW, STEP):
        products += tl.load(one_ptr + t * ONE_ROWS).to(tl.int64) * tl.load(other_ptr + t * OTHER_ROWS)
    return tl.sum(products, 1)


@triton.jit
def sum_of_squares(loads):
    """Of rows of loads below 2^22, int64."""
    return sum_in_halves(loads.to(tl.int64) * loads)


@triton.jit
def sum_in_halves(numbers):
    """Sums of rows of up to 32 int64 numbers below 2^47: halves of 22 bits are sums of int32, an instruction each."""
    lower = tl.sum((numbers & 0x3FFFFF).to(tl.int32), 1).to(tl.int64)
    return (tl.sum((numbers >> 22).to(tl.int32), 1).to(tl.int64) << 22) + lower


@triton.jit
def total_loads(memory, expert, shape: tl.constexpr):
    """Sums over the samples of the loads (int32) and of their squares (int64) of experts [lanes]."""
    added, squares = expert * 0, (expert * 0).to(tl.int64)
    sample_ptr = sample_rows(memory.ints + shape.at.sample, expert, shape)
    for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
        load = tl.load(sample_ptr + t * shape.experts)
        added += tl.sum(load, 1)
        squares += tl.sum(load.to(tl.int64) * load, 1)
    return added, squares


PRICE = tl.constexpr(0)
PEAK = tl.constexpr(1)
TOP = tl.constexpr(5)
POTENTIAL = tl.constexpr(6)
INVERSE = tl.constexpr(7)
"""Places in memory.numbers: what a written slot must save in this search, J of a placement, what J follows from, and
2^30 / top as `power_of` wants it."""
TOO_MUCH = tl.constexpr(2.0**62)
"""In place of what a swap that is not allowed adds to a variance."""


@triton.jit(noinline=True)
def rate_gpus(memory, shape: tl.constexpr):
    """memory.gpu_power of every GPU. Returns the one of largest score, that score, and two bounds, at most 2^-13 of it
    apart, of what a step must gain more than, `least_gain`. Ties: lowest index."""
    gpu = tl.arange(0, shape.gpu_lanes)
    inside = gpu < shape.gpus
    mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
    variance = tl.load(memory.longs + shape.at.gpu_variance + gpu, mask=inside, other=0)
    price = load_number(memory, PRICE, shape)
    scores = tl.where(inside, score(mean, variance, shape), -1)
    top, heaviest = largest(scores, gpu)
    inverse = inverse_of(top) * float64(2.0**30)
    power = tl.where(inside, power_of(scores, top, inverse, shape), 0)
    tl.store(memory.ints + shape.at.gpu_power + gpu, power, mask=inside)
    potential = tl.sum(power.to(tl.int64), 0)
    store_number(memory, TOP, top.to(tl.float64), shape)
    store_number(memory, POTENTIAL, potential.to(tl.float64), shape)
    store_number(memory, INVERSE, inverse, shape)
    # of float64: float32 to int64 takes fused operations on AMD
    estimate = _estimate_least_gain(price, inverse, potential, shape).to(tl.float64)
    low = tl.maximum(estimate * float64(1.0 - 2.0**-14), float64(1.0)).to(tl.int64)
    high = (estimate * float64(1.0 + 2.0**-14)).to(tl.int64) + (estimate > 0).to(tl.int64)
    high = tl.maximum(low, high)
    tl.debug_barrier()
    return heaviest, top, low, high


@triton.jit
def floats_of(memory):
    """memory.ints as the float32 numbers that bounds, and what they are made of, are."""
    return memory.ints.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def root_near(x):
    """The root of float32 numbers above 0, by 2^-22 of it: for bounds and estimates, what is near them is worked out
    exactly. An instruction of NVIDIA's and of AMD's gives 1 / sqrt by 2^-22.9; a root rounded correctly is a branch."""
    return x * tl.rsqrt(x)


@triton.jit
def add_product(added, x, y):
    """added + x * y, float32, rounded once: for bounds, which allow for roundings. One instruction, not two."""
    return tl.fma(x, y, added)


@triton.jit
def below(near, others, shape: tl.constexpr):
    """Float32 numbers that stay below the true ones in sums like x + y - p, p a product of `multiply_own`.

    near: x, float32, a sum of up to S products and of what is exact. others: at least the sum of the spreads of the
    experts of all products in x, and of that of the expert whose x this is. By Cauchy and Schwarz a product is at most
    the sum of its two spreads; made of T terms by a rounding each, it is off by (T + 4) * 2^-24 of that sum."""
    return near - (tl.abs(near) + others) * ((shape.row + shape.slots + 16) * 2.0**-24)


@triton.jit
def _estimate_least_gain(slot_price, inverse, potential, shape: tl.constexpr):
    """`least_gain` of J that is nearly right, float32: by 2^-15, at most 2^61. inverse: 2^30 / top."""
    SQUARINGS: tl.constexpr = shape.squarings
    a_slot = slot_price * float64(shape.gpus * 2.0**shape.squarings) * inverse
    gain = tl.minimum(a_slot, float64(2.0**80)).to(tl.float32)
    # F / J is D * 2^30 / top * x^(1 - 1 / norm), x = F / (D * 2^30): that is x^(1/2), x^(1/4) ... x^(1 / norm) at once
    root = potential.to(tl.float32) * (1.0 / (shape.gpus * 2.0**30))
    for _ in tl.static_range(SQUARINGS):
        root = root_near(root)
        gain *= root
    return tl.minimum(gain, 2.0**61)


@triton.jit(noinline=True)
def peak_and_least_gain(memory, shape: tl.constexpr):
    """J of the placement that `rate_gpus` rated last, and what a step must gain more than."""
    top, potential = load_number(memory, TOP, shape), load_number(memory, POTENTIAL, shape)
    peak = predicted_peak(top, potential, shape)
    return peak, least_gain(load_number(memory, PRICE, shape), peak, potential, shape)


@triton.jit
def load_number(memory, place, shape: tl.constexpr):
    """A float64 of memory.numbers."""
    return tl.load(memory.longs + shape.at.numbers + place).to(tl.float64, bitcast=True)


@triton.jit
def store_number(memory, place, number, shape: tl.constexpr):
    tl.store(memory.longs + shape.at.numbers + place, number.to(tl.int64, bitcast=True))


@triton.jit
def score(mean, variance, shape: tl.constexpr):
    """M + trunc(z * sqrt((T * Q - M^2 + U) >> 1)), int32, of the sum M (int32) and T * Q - M^2 + U (int64).

    By Cauchy and Schwarz T * Q is at least M^2, and the spreads in U are at least 0: nothing to be cut off. Unsigned
    and by way of int64, so that of rows that are no GPU's comes some number, which is not looked at."""
    half = variance.to(tl.uint64) >> 1
    return mean + (float64(shape.z) * tl.sqrt(half.to(tl.float64))).to(tl.int64).to(tl.int32)


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
    """J = top * (F / (D * 2^30))^(1 / norm) of float64 numbers, by square roots."""
    SQUARINGS: tl.constexpr = shape.squarings
    root = potential / float64(shape.gpus * 2.0**30)
    for _ in tl.static_range(SQUARINGS):
        root = tl.sqrt(root)
    return top * root


@triton.jit
def price_of_slot(price, samples, shape: tl.constexpr):
    """The price in units of the samples: price * (T * LOAD_UNITS / D), float64."""
    return price * ((samples * LOAD_UNITS).to(tl.float64) / float64(shape.gpus))


@triton.jit
def least_gain(slot_price, peak, potential, shape: tl.constexpr):
    """What a step must gain more than, a written slot, in units of the potential: int64."""
    floor = slot_price * float64(2.0**shape.squarings) * potential / peak
    return tl.minimum(tl.maximum(floor, float64(1.0)), float64(MOST_FLOOR)).to(tl.int64)
