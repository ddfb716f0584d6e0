"""Text as it may be printed: on one line, and nothing in it that a terminal takes for a command."""

from __future__ import annotations

from pathlib import Path


def shown(path: Path) -> str:
    """The path as a user may read it: quoted and escaped if it has a line break or another control character."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def printable(text: str) -> str:
    """Text on one line that no terminal takes for commands: names in files may hold escape sequences."""
    line = " ".join(text.splitlines())
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 160 characters, behind the name of its type."""
    text = " ".join(str(error).split())
    shortened = text if len(text) <= 160 else text[:157] + "..."
    return f"{type(error).__name__}: {shortened}" if shortened else type(error).__name__
