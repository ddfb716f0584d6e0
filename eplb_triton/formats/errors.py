"""The one error of reading and writing files."""

from __future__ import annotations

from pathlib import Path

from eplb_triton.printing import printable, shown


class FormatError(ValueError):
    """A file that cannot be used: one line with its name, what was expected and what was found."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(printable(f"{shown(path)}: expected {expected}; found {found}"))
        self.path = path
