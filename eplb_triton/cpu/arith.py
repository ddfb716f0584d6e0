"""Shared arithmetic: ordered sums, divisions by counts, floats as ordered integers, a stable sort."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb_triton.cpu.compiled import stage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

LAST_INDEX = 0x7FFFFFFF
RADIX_BITS = 8  # 256 counters: 4 passes; 11 bits would be 3, but 2048 counters cost more to clear below 1000 items
RADIX = 1 << RADIX_BITS
MOST_IN_BUCKETS = 512  # items, of two buckets each in 4 * RADIX counters: twice as fast at 72 items, equal at 1,000
CROWDED = 6  # keys that an item shares its bucket with, itself among them, on average


@stage
def ints(size: int) -> Ints:
    """Room for so many. All memory comes from here: Numba compiles an np.empty anew for each type and each dimension,
    in a quarter of a second."""
    return np.empty(size, np.int64)


@stage
def floats(size: int) -> Floats:
    return np.empty(size, np.float32)


@stage
def doubles(size: int) -> Doubles:
    return np.empty(size, np.float64)


@stage
def flags(size: int) -> Flags:
    return np.empty(size, np.bool_)


@stage
def int_rows(rows: int, columns: int) -> Ints:
    return np.empty((rows, columns), np.int64)


@stage
def float_rows(rows: int, columns: int) -> Floats:
    return np.empty((rows, columns), np.float32)


@stage
def double_rows(rows: int, columns: int) -> Doubles:
    return np.empty((rows, columns), np.float64)


@stage
def counting(size: int) -> Ints:
    """0, 1 and so on."""
    numbers = ints(size)
    for i in range(size):
        numbers[i] = i
    return numbers


@stage
def ordered_sum(values: Floats) -> float:
    """The float64 sum from left to right, from 0."""
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
    return total


@stage
def ordered_bits(value: np.float32) -> int:
    """The bits of a float32 that is not negative: a larger value has a larger integer."""
    bits: int = np.int64(np.float32(value).view(np.int32))
    return bits


@stage
def value_of(bits: int) -> np.float32:
    """The inverse of `ordered_bits`."""
    value: np.float32 = np.int32(bits).view(np.float32)
    return value


@stage
def divide(load: np.float32, count: int) -> np.float32:
    """load / count in float32; Numba alone would divide a float32 by an int64 in float64."""
    replica_load: np.float32 = load / np.float32(count)
    return replica_load


@stage
def new_work(num_items: int, num_packs: int) -> Ints:
    """Room for what packing and refining so many items need."""
    return ints(2 * num_items + 4 * RADIX + num_packs)


@stage
def descending_order(loads: Floats, work: Ints) -> Ints:
    """The items of `loads` (not negative) from the heaviest down, in the first part of `work`; ties: lowest index."""
    n = loads.size
    order, spare, counters = work[:n], work[n : 2 * n], work[2 * n : 2 * n + 4 * RADIX]
    for i in range(n):  # an item is its inverted load above its index: distinct, ascending, ties in order
        order[i] = ((LAST_INDEX - ordered_bits(loads[i])) << 32) | i
    if n == 0 or n > MOST_IN_BUCKETS or not _sort_in_buckets(order, spare, counters[: 2 * n]):
        _sort_by_digits(order, spare, counters)
    for k in range(n):
        order[k] &= LAST_INDEX
    return order


@stage
def _sort_in_buckets(keys: Ints, spare: Ints, ends: Ints) -> bool:
    """Sort keys spread evenly over `ends.size` buckets between the smallest and the largest, then by insertion; false,
    and nothing done, where they crowd so that insertion would take long."""
    low, high = keys[0] >> 32, keys[0] >> 32
    for k in range(1, keys.size):
        low, high = min(low, keys[k] >> 32), max(high, keys[k] >> 32)
    scale = (ends.size << 32) // (high - low + 1)
    ends[:] = 0
    for k in range(keys.size):
        ends[(((keys[k] >> 32) - low) * scale) >> 32] += 1
    position, pairs = 0, 0
    for bucket in range(ends.size):
        held = ends[bucket]
        ends[bucket], position, pairs = position, position + held, pairs + held * held
    if pairs > CROWDED * keys.size:
        return False
    for k in range(keys.size):
        spare[k] = keys[k]
    for k in range(keys.size):
        bucket = (((spare[k] >> 32) - low) * scale) >> 32
        keys[ends[bucket]] = spare[k]
        ends[bucket] += 1
    for k in range(1, keys.size):
        key, at = keys[k], k
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key
    return True


@stage
def _sort_by_digits(keys: Ints, spare: Ints, counters: Ints) -> None:
    """Sort keys by their upper 31 bits, a least-significant-digit radix sort: stable by construction and linear."""
    counters[:] = 0
    for k in range(keys.size):
        for digit in range(4):
            counters[digit * RADIX + ((keys[k] >> (32 + RADIX_BITS * digit)) & (RADIX - 1))] += 1
    source, target = keys, spare
    for digit in range(4):
        position = 0
        for value in range(digit * RADIX, digit * RADIX + RADIX):
            counters[value], position = position, position + counters[value]
        for k in range(keys.size):
            value = digit * RADIX + ((source[k] >> (32 + RADIX_BITS * digit)) & (RADIX - 1))
            target[counters[value]] = source[k]
            counters[value] += 1
        source, target = target, source
