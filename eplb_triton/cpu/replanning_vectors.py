"""Replanning: the inner loops of a search, over candidates side by side, on plain vectors."""

from __future__ import annotations

from typing import cast

import numba
import numpy as np

from eplb_triton.cpu.arith import Doubles, Floats
from eplb_triton.cpu.compiled import PART, Function, stage
from eplb_triton.cpu.replanning_potential import SHIFT, Rule

BANNED = 1e9  # taken off the gain of what must not be done, in units of 2^30; a power is at most 2^32 of them
UNIT = 1.0 / (1 << SHIFT)


def about(function: Function) -> Function:
    """As `stage`, for what is off by a margin anyway: any order of operations, fused ones too."""
    return cast(Function, numba.njit(**(PART | {"fastmath": {"reassoc", "nsz", "contract"}}))(function))


@stage
def raise_to(value: float, norm: int) -> float:
    """value^norm, norm a power of two; 0 of what is negative."""
    power = max(value, 0.0)
    while norm > 1:
        power *= power
        norm >>= 1
    return power


@about
def add_multiples(factors: Floats, rows: Floats, out: Floats) -> None:
    """Add factors [LANES] @ rows [LANES, n] to `out` [n]: one load and store of `out` for all of them."""
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    e, f, g, h = factors[4], factors[5], factors[6], factors[7]
    for q in range(out.size):
        first = (a * rows[0, q] + b * rows[1, q]) + (c * rows[2, q] + d * rows[3, q])
        out[q] += first + ((e * rows[4, q] + f * rows[5, q]) + (g * rows[6, q] + h * rows[7, q]))


@about
def fill_gains(
    own: tuple[np.float32, np.float32, np.float32, np.float32],
    z: np.float32,
    norm: int,
    columns: Floats,
    given: Floats,
    products: Floats,
    gains: Floats,
    best: Floats,
) -> None:
    """Take the powers of both GPUs after each swap of one slot off `gains` [n]; raise `best` [n] to them.

    own: mean of the other replicas of the heaviest GPU, of its own; squared deviation of the others; twice its spread.
    """
    heavy, light, heavy_rest, light_spread = own
    from_4, from_8, from_16, from_32 = norm >= 4, norm >= 8, norm >= 16, norm >= 32
    zero, half, one, much = np.float32(0.0), np.float32(0.5), np.float32(1.0 + 2.0**-8), np.float32(2.0)
    for q in range(gains.size):
        a = heavy_rest + columns[2, q] - products[q]
        b = light_spread + columns[4, q] + given[q] - products[q]
        a = heavy + columns[1, q] + z * np.sqrt(half * max(a, zero))
        b = light + columns[3, q] + z * np.sqrt(half * max(b, zero))
        a = a if a < one else much  # a score above the largest: no gain makes up for its power
        b = b if b < one else much
        a *= a
        b *= b
        a, b = (a * a, b * b) if from_4 else (a, b)
        a, b = (a * a, b * b) if from_8 else (a, b)
        a, b = (a * a, b * b) if from_16 else (a, b)
        a, b = (a * a, b * b) if from_32 else (a, b)
        gains[q] -= a + b
        best[q] = max(best[q], gains[q])


@stage
def subtract_powers(
    mean: Doubles,
    twice: Doubles,
    products: Doubles,
    mean_change: float,
    twice_change: float,
    rule: Rule,
    top: float,
    gains: Doubles,
) -> None:
    """Take off the powers of GPUs after a move, in units of 2^30 and less than 2 * norm units of 2^-30 off the exact.

    Their loads add up to mean + mean_change; T times the sum of the squares, and the spread, are twice + twice_change -
    2 * T * products. Scores are exact.
    """
    factor, z, inverse = 2.0 * rule.num_samples, rule.z, 1.0 / max(top, 1.0)
    from_4, from_8, from_16, from_32 = rule.norm >= 4, rule.norm >= 8, rule.norm >= 16, rule.norm >= 32
    for q in range(gains.size):
        m = mean[q] + mean_change
        variance = twice[q] + twice_change - factor * products[q] - m * m
        variance = variance if variance > 0.0 else 0.0
        ratio = (m + np.floor(z * np.sqrt(np.floor(variance * 0.5)))) * inverse
        power = ratio if ratio < 1.0 + 1e-12 else 2.0  # a score above the top one: no gain makes up for its power
        power *= power
        power = power * power if from_4 else power
        power = power * power if from_8 else power
        power = power * power if from_16 else power
        power = power * power if from_32 else power
        gains[q] -= power


@stage
def largest(values: Doubles) -> float:
    """The largest of `values`, -BANNED of none."""
    most = -BANNED
    for q in range(values.size):
        most = max(most, values[q])
    return most


@stage
def largest_of(values: Floats) -> int:
    """Where the largest of `values` is. Ties: the first."""
    most = np.float32(-BANNED)
    for q in range(values.size):
        most = max(most, values[q])
    for q in range(values.size):
        if values[q] == most:
            return q
    return 0
