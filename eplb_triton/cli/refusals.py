"""How what cannot be used is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from eplb_triton.printing import shown


class Refused(click.ClickException):
    """Something the user gave cannot be used."""

    exit_code = 2


class InvalidPlan(click.ClickException):
    """A plan file that reads, but holds no valid plan."""

    exit_code = 1


@contextlib.contextmanager
def refusing(about: Path | None = None) -> Iterator[None]:
    """A ValueError inside becomes the one line that the user sees, behind the name of the file it is about."""
    try:
        yield
    except ValueError as error:
        raise Refused(f"{shown(about)}: {error}" if about else str(error)) from error
