"""Small arithmetic shared by the stages: the same bits in the interpreter, on NVIDIA and on AMD.

Reductions run on int32 keys: they compile to one warp-reduce instruction each, where a float or an
argmax reduction takes ten shuffles.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants

HIGHEST = tl.constexpr(0x7FFFFFFF)  # above every index, and above the bits of every float32 number
LOWEST = tl.constexpr(-0x80000000)
LARGEST_LOAD = tl.constexpr(constants.MAX_LOAD)
EPSILON = tl.constexpr(constants.EPSILON)


def triton_version() -> tuple[int, ...]:
    """Major and minor number of the Triton that is there."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


DIVIDES_SUBNORMAL = tl.constexpr(triton_version() >= (3, 6))
"""Before, Triton has NVIDIA's library divide float32 numbers, which takes subnormal ones for 0."""


@triton.jit
def bits(x):
    """The bits of float32 numbers as int32: of numbers that are at least +0, an ordered key."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(key):
    """The float32 numbers with these bits."""
    return key.to(tl.float32, bitcast=True)


@triton.jit
def divide(x, y):
    """x / y in float32, correctly rounded: Triton's `/` is div.full.f32 on NVIDIA, wrong by up to 2 ulp.
    `y` may be a tensor of integers."""
    y = y.to(tl.float32)
    if DIVIDES_SUBNORMAL:
        quotient = tl.math.div_rn(x, y)
    else:  # by way of float64: no quotient of float32 numbers is so near a tie that the first rounding makes it one
        quotient = ((tl.zeros_like(y) + x).to(tl.float64) / y.to(tl.float64)).to(tl.float32)
    return quotient


@triton.jit
def float64(x: tl.constexpr):
    """A float64 constant: what a bare Python float becomes depends on where it stands."""
    return tl.full((), x, tl.float64)


@triton.jit
def clean(raw):
    """Loads rounded once to float32, and which of them are bad. Bad ones and -0 become 0."""
    load = raw.to(tl.float32)
    good = (load >= 0) & (load <= LARGEST_LOAD)  # false for NaN
    return tl.where(good & (load > 0), load, 0.0), good == 0


@triton.jit
def largest(keys, index):
    """Largest int32 key and its index; ties: lowest index."""
    key = tl.max(keys, 0)
    return key, tl.min(tl.where(keys == key, index, HIGHEST), 0)


@triton.jit
def smallest(keys, index):
    """Smallest int32 key and its index; ties: lowest index."""
    key = tl.min(keys, 0)
    return key, tl.min(tl.where(keys == key, index, HIGHEST), 0)


@triton.jit
def at(values, index, position):
    """The int32 value whose index is `position`."""
    return tl.max(tl.where(index == position, values, LOWEST), 0)


@triton.jit
def lowest_free(masks):
    """The lowest bit that none of the int32 `masks` has, 32 if there is none."""
    used = tl.reduce(masks, 0, _either)
    bit = tl.arange(0, 32)
    return tl.min(tl.where((used >> bit) & 1 == 0, bit, 32), 0)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _ordered(x):
    """float64 as ordered int64 keys, negative numbers included."""
    key = x.to(tl.int64, bitcast=True)
    return key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _unordered(key):
    return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def largest_double(x, eligible, index):
    """Largest eligible float64 and its index; ties: lowest index. None eligible: index HIGHEST.

    Three int32 reductions (upper word, lower word, index) take a third of the time of one on float64."""
    key = _ordered(x)
    upper = tl.where(eligible, (key >> 32).to(tl.int32), LOWEST)
    lower = (key & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True) ^ LOWEST
    best_upper = tl.max(upper, 0)
    best_lower = tl.max(tl.where(eligible & (upper == best_upper), lower, LOWEST), 0)
    found = eligible & (upper == best_upper) & (lower == best_lower)
    low_word = (best_lower ^ LOWEST).to(tl.int64) & 0xFFFFFFFF
    value = _unordered((best_upper.to(tl.int64) << 32) | low_word)
    return value, tl.min(tl.where(found, index, HIGHEST), 0)


@triton.jit
def smallest_double(x, eligible, index):
    """Smallest eligible float64 and its index; ties: lowest index. None eligible: index HIGHEST."""
    value, position = largest_double(-x, eligible, index)
    return -value, position


@triton.jit
def ordered_sum(values_ptr, COUNT: tl.constexpr):
    """Sum of COUNT numbers in memory in float64, left to right, starting from 0."""
    total = float64(0.0)
    for i in tl.range(0, COUNT, loop_unroll_factor=8):
        total += tl.load(values_ptr + i).to(tl.float64)
    return total


@triton.jit
def ceiling(x):
    """float32 numbers in [0, 2^31) rounded up, as int32: `tl.ceil` flushes subnormals to 0 on NVIDIA."""
    whole = x.to(tl.int32)
    return whole + (whole.to(tl.float32) < x).to(tl.int32)


@triton.jit
def round_half_even(x):
    """A float64 number in [0, 2^31) rounded to the nearest integer, halves to even, as int32."""
    whole = x.to(tl.int32)
    part = x - whole.to(tl.float64)
    up = (part > 0.5) | ((part == 0.5) & (whole % 2 == 1))
    return whole + up.to(tl.int32)


@triton.jit
def owner_of_each(counts, index, offsets_ptr, position, NUM: tl.constexpr):
    """Which of NUM owners holds each position, and the position within what it holds, when owner 0 holds the first
    counts[0] positions, owner 1 the next counts[1], and so on."""
    OWNERS: tl.constexpr = counts.shape[0]
    tl.store(offsets_ptr + index, tl.cumsum(counts, 0) - counts, mask=index < NUM)
    tl.debug_barrier()
    owner = position * 0
    step = OWNERS // 2
    while step > 0:  # the last owner whose first position is not beyond: owners of none are passed over
        start = tl.load(offsets_ptr + owner + step, mask=owner + step < NUM, other=HIGHEST)
        owner = tl.where(start <= position, owner + step, owner)
        step = step // 2
    within = position - tl.load(offsets_ptr + owner)
    tl.debug_barrier()
    return owner, within
