"""Operands as PTX writes them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bench.ptx.memory import Array


def state_spaces(parts: list[str]) -> list[str]:
    """The state space of an access: `shared::cta` is `shared`."""
    return [part.partition("::")[0] for part in parts]


def split_operands(text: str) -> list[str]:
    """Split at the commas that are in no braces."""
    return [part.strip() for part in re.split(r",\s*(?![^{]*})", text.strip())]


def constant(text: str, dtype: np.dtype[Any]) -> Array:
    """The value of a literal, as `dtype`: integers, bits of floats (0f..., 0d...), booleans."""
    if text[:2] in ("0f", "0d"):
        bits = np.array(int(text[2:], 16), "u4" if text[1] == "f" else "u8")
        return bits.view("f4" if text[1] == "f" else "f8") if dtype.kind == "f" else bits.astype(dtype)
    number = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array(number != 0)
    if dtype.kind == "f":
        return np.array(number, f"u{dtype.itemsize}").view(dtype)
    return np.array(number % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
