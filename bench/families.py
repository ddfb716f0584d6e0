"""Families of loads, from a seed; needs NumPy and torch alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def _one_outlier(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    loads = rng.integers(1, 4, shape).astype(np.float64)
    loads[:, rng.integers(shape[1])] = 1e12
    return loads


def _zipf(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.permuted(np.broadcast_to(1e6 / np.arange(1, shape[1] + 1), shape), axis=1)


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "continuous": lambda rng, shape: rng.lognormal(8.0, 1.0, shape),
    "ties": lambda rng, shape: rng.integers(0, 4, shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "mostly idle": lambda rng, shape: rng.integers(1, 100, shape) * (rng.random(shape) < 0.1),
    "equal": lambda rng, shape: np.full(shape, 7.0),
    "outlier": _one_outlier,
    "zipf": _zipf,
    "tiny": lambda rng, shape: rng.random(shape) * 1e-30,
    "denormal": lambda rng, shape: rng.integers(0, 50, shape) * 1.401298464324817e-45,
    "huge": lambda rng, shape: rng.random(shape) * 1e30,
}


def loads(family: str, seed: int, layers: int, experts: int) -> Tensor:
    """Loads [layers, experts] float32 of one of `FAMILIES`."""
    values = FAMILIES[family](np.random.default_rng(seed), (layers, experts))
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)
