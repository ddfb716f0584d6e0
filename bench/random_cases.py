"""Random small cases for the conformance run: any topology, loads without and with ties."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eplb_triton import Topology

TIE_FREE = "random, tie-free"
TIED = "random, integers with ties"
IDLE = "random, many idle experts"
_LAYERS = 3


def random_cases(count: int, seed: int) -> Iterator[tuple[str, Tensor, Topology]]:
    """`count` times (kind, loads [3, E] float32, topology), E up to 192; half of them tie-free, half hierarchical."""
    random = np.random.default_rng(seed)
    for at in range(count):
        kind = (TIE_FREE, TIED, TIE_FREE, IDLE)[at % 4]
        topology, experts = _cluster(random, hierarchical=at % 8 >= 4)
        yield kind, torch.from_numpy(_loads(random, kind, experts)), topology


def _cluster(random: np.random.Generator, *, hierarchical: bool) -> tuple[Topology, int]:
    """A topology and E that fit each other, drawn so that no draw is thrown away."""
    nodes = int(random.choice([2, 4])) if hierarchical else 1
    groups = nodes * int(random.integers(1, 5)) if hierarchical else 1
    gpus = nodes * int(random.integers(1, 9))
    experts = groups * int(random.integers(1, max(2, 192 // groups)))
    slots = -(-experts // gpus) + int(random.integers(0, 3))
    return Topology(num_replicas=slots * gpus, num_gpus=gpus, num_groups=groups, num_nodes=nodes), experts


def _loads(random: np.random.Generator, kind: str, experts: int) -> NDArray[np.float32]:
    shape = (_LAYERS, experts)
    if kind == TIED:
        return random.integers(0, 12, shape).astype(np.float32)
    loads = (1000 * np.exp(random.uniform(0.3, 1.5) * random.standard_normal(shape))).astype(np.float32)
    if kind == IDLE:
        loads[random.random(shape) < 0.7] = 0
        return loads
    return np.stack([_distinct(random, row) for row in loads])


def _distinct(random: np.random.Generator, row: NDArray[np.float32]) -> NDArray[np.float32]:
    while len(np.unique(row)) < len(row):
        row = row * random.uniform(0.9, 1.1, len(row)).astype(np.float32)
    return row
