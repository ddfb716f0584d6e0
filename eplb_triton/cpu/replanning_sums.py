"""Replanning: sums of whole numbers, which keep every bit in any order."""

from __future__ import annotations

from typing import cast

import numba

from eplb_triton.cpu.arith import Doubles
from eplb_triton.cpu.compiled import PART, Function


def in_any_order(function: Function) -> Function:
    """As `stage`, for sums that are exact: they may be taken in any order, which makes vectors of them."""
    return cast(Function, numba.njit(**(PART | {"fastmath": {"reassoc", "nsz"}}))(function))


@in_any_order
def sum_product(a: Doubles, b: Doubles) -> float:
    """Sum of a * b, whole numbers; below 2^53, so that every order gives the same bits."""
    total = 0.0
    for t in range(a.size):
        total += a[t] * b[t]
    return total


@in_any_order
def sum_of(a: Doubles) -> float:
    """Sum of a, whole numbers; below 2^53, so that every order gives the same bits."""
    total = 0.0
    for t in range(a.size):
        total += a[t]
    return total


@in_any_order
def add_to(a: Doubles, total: Doubles) -> None:
    """Add a to `total`, element by element."""
    for t in range(a.size):
        total[t] += a[t]


@in_any_order
def exchanged(loads: Doubles, given: Doubles, taken: Doubles) -> tuple[float, float]:
    """Sum of loads - given + taken, and the sum of their squares; as `sum_of`."""
    total = square = 0.0
    for t in range(loads.size):
        load = loads[t] - given[t] + taken[t]
        total += load
        square += load * load
    return total, square
