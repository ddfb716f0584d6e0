"""Section "Arithmetic": sums from left to right, ties to the lowest index, fixed point."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

EPS = 1e-12
EPS32 = np.float32(1e-12)


def total(values: Iterable[float]) -> float:
    """Float64 sum, one term after the other, from 0."""
    result = 0.0
    for value in values:
        result += float(value)
    return result


def mean(values: Floats | list[float]) -> float:
    return total(values) / len(values)


def largest(values: Floats | list[float]) -> list[int]:
    """Indices by value descending; ties: lowest index."""
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))


def smallest(values: Floats | list[float]) -> list[int]:
    """Indices by value ascending; ties: lowest index."""
    return sorted(range(len(values)), key=lambda i: (float(values[i]), i))


def divide(loads: Floats, counts: Ints) -> Floats:
    """w/c in float32."""
    quotients: Floats = np.divide(loads, counts.astype(np.float32))
    return quotients


def fixed_point(loads: Floats, capacity: int) -> tuple[list[int], int]:
    """Integer loads and their scale."""
    heaviest = float(loads.max())
    if heaviest == 0:
        return [0] * len(loads), 0
    scale = 27 - (capacity - 1).bit_length() - (math.frexp(heaviest)[1] - 1)
    return [math.trunc(math.ldexp(float(load), scale)) for load in loads], scale
