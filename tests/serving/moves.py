"""Pairs of placements that the tests of transfers share. No test in here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eplb_triton import Topology


class Pair(NamedTuple):
    """Arguments of `list_transfers`."""

    ahead: Tensor
    live: Tensor
    experts: int
    topology: Topology

    def node(self, slot: int) -> int:
        """Which node a slot is on: one for all where the nodes do not divide the GPUs."""
        gpus, nodes = self.topology.num_gpus, self.topology.num_nodes
        gpu = slot // (self.topology.num_replicas // gpus)
        return gpu // (gpus // nodes) if gpus % nodes == 0 else 0


def drawn_pair(seed: int, layers: int = 2) -> Pair:
    """Two placements by chance: few slots or many kept, gaps on either side, doubled replicas, experts that nobody
    holds, one node or several."""
    random = np.random.default_rng(seed)
    nodes = int(random.integers(1, 4))
    gpus, slots = nodes * int(random.integers(1, 8)), int(random.integers(1, 9))
    experts = int(random.integers(1, gpus * slots + 1))
    live = random.integers(-1 if random.random() < 0.5 else 0, experts, (layers, gpus * slots))
    fresh = random.integers(-1 if random.random() < 0.3 else 0, experts, live.shape)
    ahead = np.where(random.random(live.shape) < random.random(), live, fresh)
    nodes += int(random.random() < 0.2)
    topology = Topology(num_replicas=gpus * slots, num_gpus=gpus, num_groups=nodes + 1, num_nodes=nodes)
    return Pair(torch.from_numpy(ahead), torch.from_numpy(live), experts, topology)


def skewed_pair() -> Pair:
    """GPU 0 alone holds anything: all others fetch from it, 126 batches, more than a mask of 32 or 62 has bits."""
    live, ahead = torch.full((1, 128), -1), torch.arange(128).unsqueeze(0) % 2
    live[0, :2] = torch.arange(2)
    return Pair(ahead, live, 2, Topology(num_replicas=128, num_gpus=64, num_nodes=8))
