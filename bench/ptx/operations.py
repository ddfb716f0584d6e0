"""What each instruction computes: NumPy operations that round once, as PTX says of `.rn`."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx.memory import Array

Operand = Callable[[], Array]
Kinds = list[np.dtype[Any]]
Computed = tuple[np.dtype[Any], Kinds, Callable[..., Array]]

DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{
        f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
        for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
        for bits in (8, 16, 32, 64)
    },
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}
_U32 = DTYPES["u32"]


def _minimum(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _maximum(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": _minimum,
    "max": _maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ONE: dict[str, Callable[[Array], Array]] = {
    "mov": np.array,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: ((1 + 2**-22.9) / np.sqrt(x.astype(np.float64))).astype(x.dtype),  # as far off as it may be
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}
ATOMIC: dict[str, Callable[[Array, Array], Array]] = {"add": np.add, "max": np.maximum, "min": np.minimum}
_ROUND: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


def compute(parts: list[str]) -> Computed:
    """Type of the result, types of the sources and the function of an instruction of registers alone.

    Raises:
        KeyError: it is not modelled.
    """
    if parts[-1].endswith("16x2"):
        half = DTYPES[parts[-1].removesuffix("x2")]
        return _U32, [_U32, _U32], lambda a, b: _TWO[parts[0]](_parts(a, half), _parts(b, half)).view(_U32)
    name, kind = parts[0], DTYPES[parts[-1]]
    if name in _ONE:
        return kind, [kind], _ONE[name]
    if name in ("mul", "mad") and kind.kind != "f":
        return _multiply(parts)
    if name in _TWO:
        return kind, [kind, kind], _TWO[name]
    others: dict[str, Callable[[], Computed]] = {
        "div": lambda: (kind, [kind, kind], np.divide if kind.kind == "f" else _divide),
        "rem": lambda: (kind, [kind, kind], lambda a, b: a - _divide(a, b) * b),
        "setp": lambda: (DTYPES["pred"], [kind, kind], _COMPARE[parts[1]]),
        "selp": lambda: (kind, [kind, kind, DTYPES["pred"]], _select),
        "cvt": lambda: _convert(parts),
        "shl": lambda: (kind, [kind, _U32], _shift(name, kind)),
        "shr": lambda: (kind, [kind, _U32], _shift(name, kind)),
        "bfe": lambda: (kind, [kind, _U32, _U32], lambda a, start, size: _field(a, start, size, kind)),
        "popc": lambda: (_U32, [kind], lambda a: np.array([int(x).bit_count() for x in a])),
        "fma": lambda: (kind, [kind, kind, kind], lambda a, b, c: (a.astype(np.float64) * b + c).astype(kind)),
        "prmt": lambda: (kind, [kind, kind, kind], _permute_bytes),
    }
    return others[name]()


def shuffle(mode: str, values: Array, lane: Array) -> Array:
    """shfl.sync of whole warps."""
    own = np.arange(len(values)) % 32
    other = {"bfly": own ^ lane, "idx": lane % 32, "up": own - lane, "down": own + lane}[mode]
    other = np.where((other < 0) | (other > 31), own, other)
    return values[np.arange(len(values)) - own + other]


def reduce_warps(operation: str, values: Array) -> Array:
    """redux.sync of whole warps."""
    by_warp = values.reshape(-1, 32)
    function = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}[
        operation
    ]
    return np.repeat(function.reduce(by_warp, axis=1, dtype=values.dtype), 32)


def _parts(a: Array, kind: np.dtype[Any]) -> Array:
    return np.ascontiguousarray(a).view(kind)


def _select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _divide(a: Array, b: Array) -> Array:
    """Integer division towards zero; of 0, whatever."""
    safe = np.where(b == 0, 1, b)
    quotient = a // safe
    return (quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))).astype(a.dtype)


def _convert(parts: list[str]) -> Computed:
    result, source = DTYPES[parts[-2]], DTYPES[parts[-1]]
    rounding = next((part for part in parts if part in _ROUND), None)
    if "ftz" in parts:
        raise KeyError("cvt.ftz")
    if rounding and result.kind == "f":
        return result, [source], _ROUND[rounding]
    if rounding:
        bounds = np.iinfo(result)

        def to_integer(a: Array) -> Array:
            whole = np.nan_to_num(_ROUND[rounding](a.astype(np.float64)), nan=0.0)
            inside = np.clip(whole, float(bounds.min), float(bounds.max))
            return np.where(inside >= float(bounds.max), bounds.max, inside.astype(result))

        return result, [source], to_integer
    return result, [source], lambda a: a.astype(result)


def _shift(name: str, kind: np.dtype[Any]) -> Callable[[Array, Array], Array]:
    bits = 8 * kind.itemsize

    def shift(a: Array, by: Array) -> Array:
        if name == "shl":
            return np.where(by < bits, np.left_shift(a, np.minimum(by, bits - 1).astype(kind)), kind.type(0))
        if kind.kind == "i":
            return np.right_shift(a, np.minimum(by, bits - 1).astype(kind))
        return np.where(by < bits, np.right_shift(a, np.minimum(by, bits - 1).astype(kind)), kind.type(0))

    return shift


def _multiply(parts: list[str]) -> Computed:
    kind = DTYPES[parts[-1]]
    if "wide" in parts:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        if parts[0] == "mul":
            return wide, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide)
        return wide, [kind, kind, wide], lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if "hi" in parts and kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        return kind, [kind, kind], lambda a, b: (a.astype(wide) * b.astype(wide)) >> (8 * kind.itemsize)
    if "hi" in parts:  # no integer of NumPy has 128 bits
        return kind, [kind, kind], np.vectorize(lambda a, b: int(a) * int(b) >> 64, otypes=[kind])
    if "lo" in parts and parts[0] == "mul":
        return kind, [kind, kind], np.multiply
    if "lo" in parts:
        return kind, [kind, kind, kind], lambda a, b, c: a * b + c
    raise KeyError(".".join(parts))


def _field(a: Array, start: Array, size: Array, kind: np.dtype[Any]) -> Array:
    bits = 8 * kind.itemsize
    up = (bits - start.astype(np.int64) - size).clip(0, bits - 1).astype(kind)
    down = (bits - size.astype(np.int64)).clip(0, bits - 1).astype(kind)
    return np.right_shift(np.left_shift(a, up), down)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for at in range(4):
        pick = (selector >> np.uint32(4 * at)) & np.uint32(7)
        byte = (eight >> (pick * 8).astype(np.uint64)) & np.uint64(255)
        result |= byte.astype(np.uint32) << np.uint32(8 * at)
    return result
