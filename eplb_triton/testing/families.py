"""Awkward cases, from a seed: loads of every family, on topologies of odd sizes.

Needs NumPy and torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from eplb_triton.synthetic import AWKWARD, awkward_loads
from eplb_triton.topology import Topology

FAMILIES = AWKWARD
loads = awkward_loads


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
