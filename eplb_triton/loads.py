"""The one gate that loads pass: shape, type, and what each value may be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_LOAD = 2.0**100
"""Largest load accepted: sums of any number of experts stay finite in float32."""


def check_loads(loads: Tensor, *, name: str = "loads", history: bool = False) -> None:
    """Refuse what cannot be loads, by what can be told without reading them.

    Raises:
        TypeError: `loads` is no tensor.
        ValueError: it is not [L, E] (with `history`: or [n, L, E] of at least one step), or it is complex or boolean.
    """
    if not isinstance(loads, Tensor):
        raise TypeError(f"{name} is a {type(loads).__name__}, must be a torch.Tensor [layers, experts]")
    if loads.dim() != 2 and not (history and loads.dim() == 3):
        shapes = "2-D: [layers, experts], or 3-D: [steps, layers, experts]" if history else "2-D: [layers, experts]"
        raise ValueError(f"{name} has shape {tuple(loads.shape)}, must be {shapes}")
    if loads.dim() == 3 and len(loads) == 0:
        raise ValueError(f"{name} has shape {tuple(loads.shape)}, must hold at least one step")
    if loads.dtype == torch.bool or loads.is_complex():
        raise ValueError(f"{name} has dtype {loads.dtype}, must be real or integer")


def as_loads(loads: Tensor, *, name: str = "loads", history: bool = False) -> Tensor:
    """`loads` on the CPU, contiguous, each rounded once to float32, -0 made 0, every one of them usable.

    Raises:
        TypeError, ValueError: as `check_loads`; or one is NaN, negative or above 2**100: the first is named.
    """
    check_loads(loads, name=name, history=history)
    given = loads.detach().to("cpu", torch.float32).numpy()
    usable = np.add(given, np.float32(0), order="C")  # by NumPy, whose small calls take a third of PyTorch's time
    if usable.size and not (usable.min() >= 0 and usable.max() <= MAX_LOAD):  # both are NaN if any load is
        first = tuple(np.argwhere(~((usable >= 0) & (usable <= MAX_LOAD)))[0].tolist())
        raise bad_load(loads, first, name)
    return torch.from_numpy(usable)


def check_judged(loads: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse loads that a placement cannot be judged by; values are looked at on the CPU alone, for nothing may wait.

    Raises:
        TypeError, ValueError: as `as_loads`, or `loads` is not of `shape` [L, E].
    """
    check_loads(loads)
    if tuple(loads.shape) != shape:
        raise ValueError(f"loads has shape {tuple(loads.shape)}, must be [layers, experts] = {shape}")
    if loads.device.type == "cpu":
        as_loads(loads)


def bad_load(loads: Tensor | None, at: tuple[int, ...], name: str = "loads") -> ValueError:
    """The error that names the first load that is NaN, negative or above 2**100, with its value where that is known."""
    value = "" if loads is None else f"={loads[at].item()!r}"
    return ValueError(
        f"{name}[{', '.join(map(str, at))}]{value} must be a finite load of at least 0 and at most 2**100; it is the "
        "first that is not"
    )
