"""Replanning, bounds: float32 numbers that no gain is above, so that few moves are valued exactly.

Variances, scores and powers are taken for less than they are, by 2^-20 or more where some operations are rounded. Which
moves are valued exactly depends on it and on nothing else: what is found does not.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import HIGHEST

LESS = tl.constexpr(1.0 - 2.0**-20)
"""Float32 roundings, of 2^-24 each: there are at most eight where this is taken off, or one and a root's 2^-22."""
GREATER = tl.constexpr(1.0 + 2.0**-18)
"""Of a sum that is taken off: more than twice what `LESS` makes of it."""
NO_BOUND = tl.constexpr(-(2.0**40))
"""Of what is not allowed, or no gain: a move that brings a GPU above the top. A swap that is not allowed does so by a
variance of `TOO_MUCH`; where z is 0 it has a bound like the others, and may be valued for nothing."""
WHOLE_POWER = tl.constexpr(2.0**constants.POWER_BITS)
CUT_OFF = tl.constexpr(512)
"""More than a power is cut by, 2 * norm, and its rounding, 64."""


@triton.jit
def squared(ratio, shape: tl.constexpr):
    """ratio^norm."""
    SQUARINGS: tl.constexpr = shape.squarings
    for _ in tl.static_range(SQUARINGS):
        ratio = ratio * ratio
    return ratio


@triton.jit
def choose_promising(memory, bound, second, promising, shape: tl.constexpr):
    """memory.promising: what has the largest bound of each few lanes, of the lowest number. Returns the largest bound
    of the others.

    bound, second: bits of the two largest of each lane, [lanes], 0 of none. promising: what the largest is of."""
    ROWS: tl.constexpr = shape.swap_rows
    FEW: tl.constexpr = shape.lanes // ROWS
    bound, promising = tl.reshape(bound, (ROWS, FEW)), tl.reshape(promising, (ROWS, FEW))
    highest = tl.max(bound, 1)
    at = tl.min(tl.where(bound == highest[:, None], promising, HIGHEST), 1)
    others = tl.where(promising == at[:, None], tl.reshape(second, (ROWS, FEW)), bound)
    tl.store(memory.ints + shape.at.promising + tl.arange(0, ROWS), at)
    rest = tl.max(tl.reshape(others, (shape.lanes,)), 0)
    tl.debug_barrier()
    return rest
