"""Replanning: the inner loops of a search, over candidates side by side, on plain vectors."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import SHIFT, Rule

BANNED = 1e9  # taken off the gain of what must not be done, in units of 2^30; a power is at most 2^32 of them
UNIT = 1.0 / (1 << SHIFT)


@stage
def add_multiples(
    x: float, y: float, z: float, w: float, a: Doubles, b: Doubles, c: Doubles, d: Doubles, out: Doubles
) -> None:
    """Add x * a + y * b + z * c + w * d to `out`: four samples at a time, one load and store of `out` for all."""
    for q in range(out.size):
        out[q] += (x * a[q] + y * b[q]) + (z * c[q] + w * d[q])


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
