"""Counts: D'Hondt with no more replicas of an expert than there are GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import per_replica
from eplb_triton.constants import replica_cap


def capped_counts(loads: Tensor, num_replicas: int, num_packs: int) -> Tensor:
    """D'Hondt counts [rows, e] int64 of `loads` [rows, e] float32: replica after replica to the expert of largest w/c
    among those of fewer than `num_packs` replicas.

    Where that many replicas cannot be held without two on a GPU, the cap is lifted. Idle rows (all loads 0) count as
    rows of equal loads: their replicas are spread evenly. Ties: lowest expert.
    """
    num_experts = loads.shape[1]
    cap = replica_cap(num_replicas, num_experts, num_packs)
    loads = torch.where(loads.amax(1, keepdim=True) == 0, 1.0, loads)
    counts = torch.ones(loads.shape, dtype=torch.int64, device="cpu")
    load = loads.clone() if cap > 1 else torch.full_like(loads, -torch.inf)
    for _ in range(num_replicas - num_experts):
        chosen = load.argmax(1, keepdim=True)
        count = counts.gather(1, chosen) + 1
        counts.scatter_(1, chosen, count)
        share = per_replica(loads.gather(1, chosen), count)
        load.scatter_(1, chosen, share.masked_fill_(count == cap, -torch.inf))
    return counts
