"""Families of awkward loads, from a seed: ties by the hundred, idle experts, outliers, what is nearly not a number.

Needs NumPy and torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eplb_triton.topology import Topology


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
    """Loads [layers, experts] float32 of one of `FAMILIES`, the same from the same seed.

    Raises:
        ValueError: no family has that name.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown, must be one of {', '.join(FAMILIES)}")
    values = FAMILIES[family](np.random.default_rng(seed), (layers, experts))
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)


class Case(NamedTuple):
    """Loads, and a topology that their experts fit."""

    name: str  # says how it was drawn
    loads: Tensor  # [L, E] float32, tokens
    topology: Topology


def awkward_cases(count: int, seed: int = 0, *, max_experts: int = 64) -> Iterator[Case]:
    """`count` cases, every family in turn, on topologies of odd sizes: one GPU, one expert, one slot a GPU, no spare
    replica, more replicas than GPUs, hierarchical and global; the same from the same seed.

    Args:
        count: so many.
        seed: of all draws.
        max_experts: E is at most this.

    Raises:
        ValueError: `count` is negative, or `max_experts` below 1.
    """
    if count < 0 or max_experts < 1:
        raise ValueError(f"count={count} must be at least 0, max_experts={max_experts} at least 1")
    rng = np.random.default_rng(seed)
    for at in range(count):
        family = list(FAMILIES)[at % len(FAMILIES)]
        nodes = int(rng.integers(1, min(4, max_experts) + 1))
        groups = nodes * int(rng.integers(1, max(1, min(4, max_experts // nodes)) + 1))
        experts = groups * int(rng.integers(1, max_experts // groups + 1))
        gpus = nodes * int(rng.integers(1, 7))
        slots = -(-experts // gpus) + int(rng.integers(0, 5))
        if rng.random() < 0.5:  # global: as many groups as no number of nodes divides
            groups, experts = nodes + 1, int(rng.integers(1, experts + 1))
        topology = Topology(num_replicas=gpus * slots, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
        if topology.hierarchical and experts % groups:
            topology = Topology(num_replicas=gpus * slots, num_gpus=gpus)
        yield Case(f"{family} {seed}.{at}", loads(family, seed + at, 1 + at % 5, experts), topology)
