"""Replanning: whether a placement in force can be planned on, and experts for its empty slots."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.replan_status import (
    EMPTY_ON_NODES,
    EXPERTS_MISSING,
    FINE,
    GROUP_SPLIT,
    GROUPS_UNEVEN,
    OUT_OF_RANGE,
)
from eplb_triton.topology import Topology


def previous_status(previous: Tensor, num_experts: int, topology: Topology) -> Tensor:
    """[L] int32: why each layer of `previous` [L, P] int64 cannot be planned on, the lowest of `replan_status`."""
    num_layers, num_nodes, num_groups = len(previous), topology.planned_nodes, topology.planned_groups
    outside = (previous < -1) | (previous >= num_experts)
    empty = previous == -1
    placed = torch.where(outside | empty, num_experts, previous)  # an expert more, for slots without one
    held = torch.zeros(num_layers, num_nodes, num_experts + 1, dtype=torch.bool, device="cpu")
    held.scatter_(2, placed.view(num_layers, num_nodes, -1), True)
    held = held[:, :, :num_experts]
    groups = held.view(num_layers, num_nodes, num_groups, -1).any(3)  # [L, N, G]
    broken = {
        OUT_OF_RANGE: outside.any(1),
        EMPTY_ON_NODES: empty.any(1) & (num_nodes > 1),
        EXPERTS_MISSING: (~held.any(1)).sum(1) > empty.sum(1),
        GROUP_SPLIT: (groups.sum(1) > 1).any(1),
        GROUPS_UNEVEN: (groups.sum(2) != num_groups // num_nodes).any(1)
        & (num_nodes > 1),  # else a group may be all -1
    }
    status = torch.full((num_layers,), FINE, dtype=torch.int32, device="cpu")
    for reason, where in sorted(broken.items(), reverse=True):
        status.masked_fill_(where, reason)
    return status


def fill_slots(previous: Tensor, total: Tensor, num_gpus: int) -> Tensor:
    """`previous` [L, P] with an expert in every slot of -1, slot after slot.

    While an expert has no replica: the one of the largest load. Else the one of the largest load a replica, compared
    exactly, among those that the slot's GPU does not hold, or among all where it holds all.

    Args:
        previous: [L, P] int64.
        total: [L, E] int64, loads of the experts.
        num_gpus: D.

    Ties: lowest expert.
    """
    filled, num_experts = previous.clone(), total.shape[1]
    slots_per_gpu = previous.shape[1] // num_gpus
    for layer, slot in (previous == -1).nonzero().tolist():
        row, gpu = filled[layer], slot // slots_per_gpu
        counts = torch.bincount(row[row >= 0], minlength=num_experts)
        held = row[gpu * slots_per_gpu : (gpu + 1) * slots_per_gpu]
        candidates = (counts == 0).nonzero().squeeze(1).tolist()
        if not candidates:
            candidates = sorted(set(range(num_experts)) - set(held.tolist())) or list(range(num_experts))
        loads, divisors = total[layer].tolist(), counts.clamp(min=1).tolist()
        best = candidates[0]
        for expert in candidates[1:]:
            if loads[expert] * divisors[best] > loads[best] * divisors[expert]:
                best = expert
        row[slot] = best
    return filled
