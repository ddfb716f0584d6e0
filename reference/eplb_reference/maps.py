"""Maps: from packed rows to the physical slots of their layers."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.topology import Topology


def physical_maps(
    pack: Tensor,  # [L * N, p] int64, GPU of each replica on its node
    slot: Tensor,  # [L * N, p] int64, slot there
    expert: Tensor,  # [L * N, p] int64, expert of each replica, numbered within the layer
    rank: Tensor,  # [L * N, p] int64, its number among the expert's replicas
    num_experts: int,
    topology: Topology,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write each replica at its physical slot n·p + q·S + k.

    Returns:
        phy2log [L, P], phyrank [L, P], logcnt [L, E], int64: expert and replica rank in each slot, and the number of
        replicas of each expert.
    """
    place = pack * topology.slots_per_gpu + slot
    phy2log = torch.empty_like(expert).scatter_(1, place, expert).view(-1, topology.num_replicas)
    phyrank = torch.empty_like(rank).scatter_(1, place, rank).view(-1, topology.num_replicas)
    logcnt = torch.zeros(phy2log.shape[0], num_experts, dtype=torch.int64, device="cpu")
    return phy2log, phyrank, logcnt.scatter_add_(1, phy2log, torch.ones_like(phy2log))
