"""Loads of tests in files of every type, written without the code under test; and what a refusal of one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_triton.formats import (
    FormatError,
    read_loads,
)

RNG = np.random.default_rng(0)


LOADS = RNG.integers(0, 1000, (3, 8))  # [L, E]


SERIES = RNG.integers(0, 1000, (5, 3, 8))  # [T, L, E]


IDS = RNG.integers(0, 8, (40, 3, 2))  # [tokens, L, k]


IDS[0, 0, 0] = 7


def save(path: Path, value: Any) -> Path:
    """Write `value` (array, or dict of arrays) by the suffix of `path`, without the code under test."""
    named = value if isinstance(value, dict) else {"loads": value}
    if path.suffix == ".npy":
        np.save(path, value)
    elif path.suffix == ".npz":
        np.savez(path, **named)
    elif path.suffix == ".pt":
        tensors = {name: torch.as_tensor(array) for name, array in named.items()}
        torch.save(tensors if isinstance(value, dict) else tensors["loads"], path)
    elif path.suffix == ".json":
        lists = {name: np.asarray(array).tolist() for name, array in named.items()}
        path.write_text(json.dumps(lists if isinstance(value, dict) else lists["loads"]))
    else:
        path.write_text("\n".join(",".join(map(str, row)) for row in value.tolist()))
    return path


def found(path: Path, **options: Any) -> str:
    """What the refusal of a file says was found; it is one line that begins with the file and an expectation."""
    with pytest.raises(FormatError) as caught:
        read_loads(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: expected ")
    return text.partition("; found ")[2]


def refusal(read: Any, path: Path, **options: Any) -> str:
    """What a refusal says was found; it is one line that names the file and what was expected."""
    with pytest.raises(FormatError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}")
    assert ": expected " in text
    return text.partition("; found ")[2]


def write_text(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
