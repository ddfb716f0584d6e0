"""Copies of the kernels with a fault in them."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eplb_triton.kernels


class Planter:
    """Plants a fault in a copy of the kernels, for one test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        monkeypatch.syspath_prepend(folder)

    def __call__(self, file: str, sound: str, faulty: str) -> ModuleType:
        """`specs` of the copy, in which `sound` in `file` reads `faulty`."""
        copy = self._folder / "planted_kernels"
        shutil.copytree(Path(eplb_triton.kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path in copy.glob("*.py"):
            text = path.read_text()
            if path.name == file:
                assert sound in text, f"{file} no longer holds {sound!r}"
                text = text.replace(sound, faulty)
            path.write_text(text.replace("eplb_triton.kernels", "planted_kernels"))
        return importlib.import_module("planted_kernels.specs")

    @staticmethod
    def forget() -> None:
        """Let the next test import its own copy."""
        for name in [name for name in sys.modules if name.startswith("planted_kernels")]:
            del sys.modules[name]
