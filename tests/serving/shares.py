"""Recorded and drawn splits that the tests share. No test in here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eplb_triton import Topology
from tests.cases import golden_arrays


class Golden(NamedTuple):
    """One recorded case: tensors of one layer, by their names in the file."""

    name: str
    topology: Topology
    arrays: dict[str, Tensor]

    @property
    def phy2log(self) -> Tensor:
        return self.arrays["phy2log"].unsqueeze(0)

    @property
    def counts(self) -> Tensor:
        return self.arrays["counts"].unsqueeze(0)

    @property
    def experts(self) -> int:
        return len(self.arrays["counts"])


class Drawn(NamedTuple):
    """A placement [L, P], with gaps and doubled replicas perhaps, and tokens [L, E] of experts that have a slot."""

    phy2log: Tensor
    counts: Tensor
    topology: Topology


def golden_shares() -> Iterator[Golden]:
    """All recorded cases."""
    arrays = golden_arrays("shares")
    for name in dict.fromkeys(key.split("/")[0] for key in arrays):
        own = {key.split("/")[1]: value for key, value in arrays.items() if key.split("/")[0] == name}
        topology = Topology(num_replicas=len(own["phy2log"]), num_gpus=int(own.pop("gpus")))
        yield Golden(name, topology, own)


def drawn(seed: int, *, layers: int = 2, tokens: int = 5000, gaps: bool = True) -> Drawn:
    """A placement by chance: from one GPU to many, few slots or many, experts with one replica or with dozens."""
    random = np.random.default_rng(seed)
    gpus, slots = int(random.integers(1, 20)), int(random.integers(1, 9))
    experts = int(random.integers(1, gpus * slots + 1))
    replicas = gpus * slots
    skew = np.exp(random.uniform(0, 2) * random.standard_normal((layers, experts)))
    phy2log = np.empty((layers, replicas), np.int64)
    for layer in range(layers):
        held = random.choice(experts, replicas, p=skew[layer] / skew[layer].sum())
        held[:experts] = np.arange(experts)
        phy2log[layer] = random.permutation(held)
        if gaps and random.random() < 0.5:
            phy2log[layer, random.random(replicas) < 0.1] = -1
    counts = random.multinomial(tokens, skew / skew.sum(1, keepdims=True))
    for layer in range(layers):
        counts[layer, np.setdiff1d(np.arange(experts), phy2log[layer])] = 0
    return Drawn(torch.from_numpy(phy2log), torch.from_numpy(counts), Topology(num_replicas=replicas, num_gpus=gpus))


def gpu_loads(quotas: Tensor, topology: Topology) -> Tensor:
    """[L, D] int64."""
    return quotas.long().view(len(quotas), topology.num_gpus, -1).sum(2)


def sums(quotas: Tensor, phy2log: Tensor, num_experts: int) -> Tensor:
    """[L, E] int64: quotas of the slots of each expert."""
    total = torch.zeros(len(quotas), num_experts + 1, dtype=torch.int64)
    return total.scatter_add_(1, phy2log.long() + 1, quotas.long())[:, 1:]
