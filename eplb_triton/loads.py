"""Loads: the one gate that they pass before anything is planned with them, judged by them, or bounded for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eplb_triton.checks import check_dense
from eplb_triton.constants import MAX_LOAD

_EVERYWHERE = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
_SOMEWHERE = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
LOAD_DTYPES = frozenset(
    dtype for name in (*_EVERYWHERE, *_SOMEWHERE) if isinstance(dtype := getattr(torch, name, None), torch.dtype)
)
"""Types of numbers that loads may be of."""


def check_shape(loads: object, *, name: str = "weight", history: bool = False, values: bool = True) -> None:
    """Refuse what can be refused without reading a value, and so without waiting for a GPU.

    Args:
        loads: [L, E], or with `history` [n, L, E], n >= 1.
        name: what the caller calls them.
        history: whether steps come first.
        values: whether they must hold values; those of a trace do not.

    Raises:
        TypeError: no tensor.
        ValueError: nested, sparse, quantized or meta; of another number of dimensions; boolean or complex; no steps.
    """
    words, dims = ("[steps, layers, experts]", 3) if history else ("[layers, experts]", 2)
    check_dense(name, loads, words, values=values)
    assert isinstance(loads, Tensor)
    if loads.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(loads.shape)}, must be {dims}-D: {words}")
    if loads.dtype not in LOAD_DTYPES:
        raise ValueError(f"{name} has dtype {loads.dtype}, must be real or integer; {name}.float() makes it so")
    if history and loads.shape[0] == 0:
        raise ValueError(f"{name} has 0 steps, must have at least 1: it is {words}")


def as_loads(
    loads: object, *, name: str = "weight", history: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Loads on the CPU, every one of them usable, in memory of their own.

    Args:
        loads: [L, E], or with `history` [n, L, E]: tokens or any unit, any real or integer dtype, any strides, on any
            device (it is waited for).
        name: what the caller calls them, for the messages.
        history: whether steps come first.
        dtype: torch.float32 to plan with: each load is rounded once, to nearest even. torch.float64 to judge by:
            nothing is rounded but integers above 2**53. Both refuse the same loads.

    Returns:
        `dtype`, of the same shape, contiguous; -0 is 0, and so is what rounds to it.

    Raises:
        TypeError, ValueError: as `check_shape`; or a load that in float32 is NaN, negative or above 2**100. The first
        one in index order is named.
    """
    check_shape(loads, name=name, history=history)
    assert isinstance(loads, Tensor)
    given = loads.detach().to("cpu", torch.float32)
    # by NumPy, whose small calls take a third of PyTorch's time
    rounded = np.add((given.resolve_neg() if given.is_neg() else given).numpy(), np.float32(0), order="C")
    if rounded.size and not (rounded.min() >= 0 and rounded.max() <= MAX_LOAD):  # both are NaN if any load is
        raise bad_load(loads, np.argwhere(~((rounded >= 0) & (rounded <= MAX_LOAD)))[0].tolist(), name=name)
    if dtype == torch.float32:
        return torch.from_numpy(rounded)
    exact = loads.detach().to("cpu", dtype).resolve_neg().numpy()
    return torch.from_numpy(np.add(np.maximum(exact, 0), exact.dtype.type(0), order="C"))


def check_judged(loads: object, shape: tuple[int, ...]) -> None:
    """Refuse loads that a placement cannot be judged by; values are looked at on the CPU alone, for nothing may wait.

    Raises:
        TypeError, ValueError: as `as_loads`, or `loads` is not of `shape` [L, E].
    """
    check_shape(loads, name="loads")
    assert isinstance(loads, Tensor)
    if tuple(loads.shape) != shape:
        raise ValueError(f"loads has shape {tuple(loads.shape)}, must be [layers, experts] = {shape}")
    if loads.device.type == "cpu":
        as_loads(loads, name="loads")


def bad_load(loads: Tensor | None, at: list[int] | tuple[int, ...], *, name: str = "weight") -> ValueError:
    """The error that names the load at index `at`, and its value where `loads` are there to read it from."""
    value = "" if loads is None else f"={loads[tuple(at)].item()!r}"
    return ValueError(
        f"{name}[{', '.join(map(str, at))}]{value} must be a finite load of at least 0 and at most 2**100; it is the "
        "first that is not"
    )
