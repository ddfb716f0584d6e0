"""Replanning: two more ways to compile a function, both of which keep every bit."""

from __future__ import annotations

from typing import cast

import numba

from eplb_triton.cpu.compiled import EXACT, Function


def in_any_order(function: Function) -> Function:
    """As `stage`, for sums that are exact: they may be taken in any order, which makes vectors of them."""
    return cast(Function, numba.njit(**(EXACT | {"fastmath": {"reassoc", "nsz"}}))(function))


def inlined(function: Function) -> Function:
    """As `stage`, but part of its caller: passing a State and the room takes as long as what is done in these."""
    return cast(Function, numba.njit(inline="always", **EXACT)(function))
