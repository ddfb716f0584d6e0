"""What is printed where: tables and words to stdout, progress to stderr."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Where no terminal sets a width: wide enough that no column of ours is ever cut.
PIPE_WIDTH = 160

_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"  # where the output cannot carry the bars


def console() -> Console:
    """stdout. Markup is off: a file may be called [red].npz."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def say(out: Console, text: str = "", style: str | None = None) -> None:
    """Print a line; a long one is left to the terminal to wrap, so that a path in it can be copied."""
    out.print(text, style=style, soft_wrap=True)


def broken(name: str, width: int) -> str:
    """The name on as few lines as make each at most `width` wide, broken behind a space or an underscore only."""
    lines = [""]
    for word in re.findall(r"[^ _]+[ _]?|[ _]", name):
        if lines[-1] and len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Gives a function that counts one piece of work of `total`; drawn only where stderr is a terminal."""
    screen = Console(stderr=True, markup=False, highlight=False)
    if not sys.stderr.isatty():  # FORCE_COLOR makes rich take any file for a terminal
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def sparkline(out: Console, loads: Sequence[float], full: float) -> str:
    """One character a value, its height a share of `full`."""
    marks = _BARS if out.encoding.lower().startswith("utf") else _DIGITS
    return "".join(marks[min(len(marks) - 1, int(load / full * len(marks)))] for load in loads)
