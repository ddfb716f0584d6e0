"""Equality of tensors that says where it ends: the first place that differs, both values there, how many differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["assert_each_same", "assert_same", "assert_same_maps"]

Values: TypeAlias = Tensor | ArrayLike

MAPS = ("phy2log", "phyrank", "logcnt")
"""What `plan_layers` returns, in order."""

_AXES = {
    "phy2log": ("layer", "slot"),
    "phyrank": ("layer", "slot"),
    "logcnt": ("layer", "expert"),
    "log2phy": ("layer", "expert", "rank"),
}


def assert_same(got: Values, want: Values, name: str) -> None:
    """Fail unless both have one shape and one type and the same values.

    Integers of different widths are of different types; `name` is the map's (its axes are then spelled out) or any
    other word, followed by whatever tells the case apart: `"phy2log of v3-global"`.
    """
    ours, theirs = _tensor(got), _tensor(want)
    if ours.shape != theirs.shape:
        raise AssertionError(f"{name} has shape {tuple(ours.shape)}, must be {tuple(theirs.shape)}")
    if ours.dtype != theirs.dtype:
        raise AssertionError(f"{name} has dtype {ours.dtype}, must be {theirs.dtype}")
    if torch.equal(ours, theirs):
        return
    differs = (ours != theirs).reshape(ours.shape or (1,))
    first = tuple(differs.nonzero()[0].tolist())
    mine, right = (tensor.reshape(differs.shape)[first].item() for tensor in (ours, theirs))
    rows = f", in {int(differs.flatten(1).any(1).sum())} of {len(differs)} rows" if differs.ndim > 1 else ""
    count = f"{int(differs.sum())} of {differs.numel()} values differ{rows}"
    raise AssertionError(f"{name}[{_place(name, first)}] is {mine}, must be {right}; {count}")


def assert_each_same(got: Iterable[Values], want: Iterable[Values], *names: str) -> None:
    """`assert_same` of one tensor after the other, as many as there are names."""
    for ours, theirs, name in zip(got, want, names, strict=True):
        assert_same(ours, theirs, name)


def assert_same_maps(got: Iterable[Values], want: Iterable[Values], case: str = "") -> None:
    """`assert_each_same` of phy2log, phyrank and logcnt; `case` is said after the map's name."""
    assert_each_same(got, want, *(f"{name} of {case}" if case else name for name in MAPS))


def _tensor(values: Values) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))


def _place(name: str, index: tuple[int, ...]) -> str:
    axes = _AXES.get(name.partition(" ")[0], ())
    if len(axes) != len(index):
        return ", ".join(map(str, index))
    return ", ".join(f"{axis} {at}" for axis, at in zip(axes, index, strict=True))
