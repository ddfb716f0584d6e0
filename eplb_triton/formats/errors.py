"""The one error of reading and writing files."""

from __future__ import annotations

from pathlib import Path


class FormatError(ValueError):
    """A file that cannot be used: one line with its name, what was expected and what was found."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(" ".join(f"{shown(path)}: expected {expected}; found {found}".splitlines()))
        self.path = path


def shown(path: Path) -> str:
    """The path as a user may read it: quoted and escaped if it has a line break or another control character."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 160 characters, behind the name of its type."""
    text = " ".join(str(error).split())
    shortened = text if len(text) <= 160 else text[:157] + "..."
    return f"{type(error).__name__}: {shortened}" if shortened else type(error).__name__
