"""The two sizes of the suite: `make test` takes a choice of cases, `make test-all` all of them.

A choice leaves no stage, no policy and no backend out; what it thins out is how many loads, shapes and targets each of
them meets. No test has fewer examples or looser rules in the one than in the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark.structures import ParameterSet

__all__ = ["chosen", "full_unless"]


def full_unless(chosen: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a case: none if `make test` takes it."""
    return () if chosen else (pytest.mark.full,)


def chosen(values: Iterable[object], *few: object) -> list[ParameterSet]:
    """Values to parametrize with, of which `make test` takes `few`; each must be one of them."""
    everything = list(values)
    assert all(value in everything for value in few), f"{few} are not all among {everything}"
    return [pytest.param(value, marks=full_unless(value in few)) for value in everything]
