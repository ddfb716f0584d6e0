"""What the threads of a program hold: registers, parameters, and their view of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx.memory import Array, Memory, RaceError
from bench.ptx.operands import constant
from bench.ptx.operations import DTYPES, Operand

Step = Callable[[Array], None]


class UnsupportedError(Exception):
    """An instruction that is not modelled here."""


class Registers:
    """Of so many threads. `specials`: `%tid.x` and its like. `passed`: bytes [threads, 256] of each parameter and
    result of a function."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.memory = Memory(0, threads)
        self.shared = Memory(0, threads)
        self.parameters: dict[str, int] = {}
        self.specials: dict[str, Any] = {"%tid.x": np.arange(threads), "%ctaid.x": 0, "%ctaid.y": 0}
        self.passed: dict[str, Array] = {}
        self._registers: dict[str, Array] = {}

    def poison(self) -> None:
        for register in self._registers.values():
            register.view(np.uint8)[...] = 0xCD

    def register(self, name: str, dtype: np.dtype[Any]) -> Array:
        size = {"%p": 1, "%rs": 2, "%r": 4, "%rd": 8}[re.sub(r"\d+$", "", name)]
        buffer = self._registers.setdefault(name, np.zeros(self.threads, f"u{size}"))
        return buffer.view(dtype) if dtype.itemsize == size else buffer

    def operand(self, text: str, dtype: np.dtype[Any]) -> Operand:
        """A function that gives the operand's value in every thread."""
        if text.startswith("%") and text not in self.specials:
            register = self.register(text, dtype)
            if register.dtype.itemsize != dtype.itemsize:  # a narrower use of a register
                return lambda: register.astype(f"u{dtype.itemsize}").view(dtype)
            return lambda: register
        if text in self.specials:
            return lambda: np.broadcast_to(self.specials[text], self.threads).astype(dtype)
        if text == "global_smem":
            return lambda: np.zeros(self.threads, dtype)
        literal = np.broadcast_to(constant(text, dtype), self.threads)
        return lambda: literal

    def address(self, text: str, *, shared: bool) -> Callable[[], Array]:
        base, _, offset = text.strip("[] ").partition("+")
        start = self.operand(base.strip(), DTYPES["s32" if shared and "%rd" not in base else "s64"])
        distance = int(offset, 0) if offset.strip() else 0
        return lambda: start().astype(np.int64) + distance


def together(mask: Array) -> None:
    warps = mask.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise RaceError("is for whole warps, and only some threads reach it")
