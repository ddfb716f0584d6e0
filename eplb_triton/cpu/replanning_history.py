"""Replanning: from a history to the few sampled steps that a placement is judged on.

Whole numbers below 2^53 are float64 here, which vectors are made of; quotients of them are corrected to be exact.
"""

from __future__ import annotations

import math

import numpy as np

from eplb_triton.constants import LOAD_BITS, LOAD_UNITS, NEWEST_STEPS
from eplb_triton.cpu.arith import Doubles, Floats, Ints, doubles, ints, value_of
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_sums import in_any_order

BITS = np.int64(LOAD_BITS)
LEAST_STEPS = 8  # fewer are all used: too few to see a change of traffic in
UNITS = np.int64(LOAD_UNITS)


@stage
def sample_history(history: Floats, layer: int, most_samples: int, samples: Doubles) -> int:
    """Fill `samples` [T, E] with the loads of a few steps of one layer, newest first; how many there are.

    history [n, L, E]: steps spread over those since the last change of traffic, loads of each adding up to about 2^20.
    """
    num_steps, e = min(history.shape[0], NEWEST_STEPS), history.shape[2]
    steps = history[history.shape[0] - num_steps :]
    totals, kept = doubles(num_steps), ints(num_steps)
    factor = _fixed_point(steps, layer)
    n = 0
    for t in range(num_steps):
        totals[n] = _total(steps[t, layer], factor)
        kept[n] = t
        n += 1 if totals[n] > 0 else 0
    share = ints(e)
    if n == 0:
        samples[0] = np.float64(UNITS // e)
        _share(np.ones(e, np.float64), share)
        _correct(samples[:1], share)
        return 1
    n = _steps_since_change(steps, layer, factor, kept, n, share)
    first = kept.size - n  # `kept` now ends with the steps used
    k = min(most_samples, n)
    for i in range(k):
        at = first + n - 1 - i * (n // k)
        step = steps[kept[at], layer]
        _scaled(step, factor, _total(step, factor), samples[i])
    _correct(samples[:k], share)
    return k


@stage
def _fixed_point(steps: Floats, layer: int) -> float:
    """What loads are multiplied with, and cut, to be whole numbers of at most 29 bits."""
    largest = np.int32(0)
    for t in range(steps.shape[0]):
        bits = steps[t, layer].view(np.int32)  # of floats not below 0 in their order; an integer maximum makes a vector
        most = np.int32(0)
        for i in range(bits.size):
            most = max(most, bits[i])
        largest = max(largest, most)
    if largest == 0:
        return 1.0
    load = np.float64(value_of(largest))
    factor: float = math.ldexp(1.0, BITS + 1 - np.int64(math.frexp(load)[1]))
    return factor


@in_any_order
def _total(step: Floats, factor: float) -> float:
    """Sum of a step's fixed-point loads, below 2^53: every order gives the same bits."""
    total = 0.0
    for i in range(step.size):
        total += np.trunc(np.float64(step[i]) * factor)
    return total


@stage
def _steps_since_change(steps: Floats, layer: int, factor: float, kept: Ints, n: int, share: Ints) -> int:
    """How many of the newest of the `n` kept steps are used, moved to the end of `kept`; fill their `share` [E].

    Those after the last block, a quarter of the steps long, whose shares differ from those of the newest block by more
    than a quarter (total variation); all of them if no block does.
    """
    kept[kept.size - n :] = kept[:n].copy()
    first, length, used = kept.size - n, n // 4, n
    total = np.zeros(share.size, np.float64)
    if n >= LEAST_STEPS:
        newest, block, sums = np.empty_like(share), np.empty_like(share), np.empty_like(total)
        used = 0
        while used + length <= n:  # what does not fill a block is not looked at
            sums[:] = 0
            for t in range(used, used + length):
                _add(steps[kept[kept.size - 1 - t], layer], factor, sums)
            _share(sums, block)
            if used == 0:
                newest[:] = block
            difference = 0
            for i in range(block.size):
                difference += abs(block[i] - newest[i])
            if difference > UNITS // 2:
                _share(total, share)
                return used
            total += sums
            used += length
    else:
        used = 0
    for at in range(first, kept.size - used):
        _add(steps[kept[at], layer], factor, total)
    _share(total, share)
    return n


@stage
def _add(step: Floats, factor: float, sums: Doubles) -> None:
    for i in range(sums.size):
        sums[i] += np.trunc(np.float64(step[i]) * factor)


@stage
def _share(sums: Doubles, share: Ints) -> None:
    """Fill each expert's part of all loads, in units of 2^-20; sums are below 2^41."""
    total = np.int64(0)
    for i in range(sums.size):
        total += np.int64(sums[i])
    for i in range(sums.size):
        share[i] = np.int64(sums[i]) * UNITS // total


@stage
def _scaled(step: Floats, factor: float, total: float, out: Doubles) -> None:
    """Fill the quotients load * 2^20 // total: the rounded one may be 1 off either way; all products are below 2^53."""
    units = np.float64(UNITS)
    for i in range(out.size):
        load = np.trunc(np.float64(step[i]) * factor) * units
        quotient = np.floor(load / total)
        quotient -= 1.0 if quotient * total > load else 0.0
        out[i] = quotient


@stage
def _correct(samples: Doubles, share: Ints) -> None:
    """Shift each expert's loads [k, E] so that their mean is its `share`; what becomes negative is 0."""
    k = np.float64(samples.shape[0])
    mean = np.zeros(samples.shape[1], np.float64)
    for t in range(samples.shape[0]):
        for i in range(mean.size):
            mean[i] += samples[t, i]
    for i in range(mean.size):
        mean[i] = np.float64(share[i]) - np.floor(mean[i] / k)
    for t in range(samples.shape[0]):
        for i in range(mean.size):
            load = samples[t, i] + mean[i]
            samples[t, i] = load if load > 0 else 0.0
