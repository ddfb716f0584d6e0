"""What the tests inside the frameworks share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def ranks(found: list[Any]) -> list[Any]:
    """What each rank of the program that a module's `found` ran has answered."""
    for number, rank in enumerate(found[1]):
        assert isinstance(rank, dict), f"rank {number}: {rank}"
    answers: list[Any] = found[1]
    return answers
