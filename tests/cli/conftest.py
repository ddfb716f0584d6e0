"""Loads in a file, for the commands to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import save_loads


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    return save_loads(tmp_path)
