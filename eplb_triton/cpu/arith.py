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
def quotient(weight: np.float32, count: int) -> np.float32:
    """weight / count in float32; Numba alone would divide a float32 by an int64 in float64."""
    share: np.float32 = weight / np.float32(count)
    return share


@stage
def new_work(num_items: int, num_packs: int) -> Ints:
    """Room for what packing and refining so many items need."""
    return np.empty(2 * num_items + 4 * RADIX + num_packs, np.int64)


@stage
def descending_order(loads: Floats, work: Ints) -> Ints:
    """The items of `loads` (not negative) from the heaviest down, in the first part of `work`; ties: lowest index.

    A least-significant-digit radix sort: stable by construction and linear.
    """
    n = loads.size
    order, keys, histogram = work[:n], work[n : 2 * n], work[2 * n : 2 * n + 4 * RADIX]
    histogram[:] = 0
    # An item is its inverted load above its index; the loads alone are sorted, the indices stay in order.
    for i in range(n):
        inverted = LAST_INDEX - ordered_bits(loads[i])
        order[i] = (inverted << 32) | i
        for digit in range(4):
            histogram[digit * RADIX + ((inverted >> (RADIX_BITS * digit)) & (RADIX - 1))] += 1
    source, target = order, keys
    for digit in range(4):
        position = 0
        for value in range(digit * RADIX, digit * RADIX + RADIX):
            histogram[value], position = position, position + histogram[value]
        for k in range(n):
            key = source[k]
            value = digit * RADIX + ((key >> (32 + RADIX_BITS * digit)) & (RADIX - 1))
            target[histogram[value]] = key
            histogram[value] += 1
        source, target = target, source
    for k in range(n):
        order[k] &= LAST_INDEX
    return order
