"""The map in force: whether it may stay, and what of it a plan can start from."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.replan_status import FINE
from eplb_triton.topology import Topology


def can_be_kept(old: Tensor | None, topology: Topology, num_experts: int) -> bool:
    """Whether a map may stay as it is: of this many slots, every one of them and every expert filled."""
    if old is None or old.dim() != 2 or old.shape[1] != topology.num_replicas or not old.numel():
        return False
    slots = old.to("cpu", torch.int64)
    if bool(((slots < 0) | (slots >= num_experts)).any()):
        return False
    held = torch.zeros(len(slots), num_experts, dtype=torch.bool)
    return bool(held.scatter_(1, slots, True).all())


def fitted(old: Tensor | None, topology: Topology, num_experts: int) -> Tensor | None:
    """[L, P] int64 on the CPU: the map in force on the GPUs that stay, -1 where one has joined or a slot is empty.

    None where there is none, or where GPUs had another number of slots.
    """
    replicas, slots = topology.num_replicas, topology.slots_per_gpu
    if old is None or old.dim() != 2 or old.shape[1] % slots:
        return None
    held = torch.full((len(old), replicas), -1, dtype=torch.int64)
    width = min(replicas, old.shape[1])
    held[:, :width] = old[:, :width]
    return held.masked_fill_((held < 0) | (held >= num_experts), -1)


def can_be_replanned(before: Tensor, num_experts: int, topology: Topology) -> bool:
    """Whether a map [L, P] int64 on the CPU is one that replanning can start from."""
    from eplb_reference.replanning_previous import previous_status  # noqa: PLC0415 - imported when it is needed

    return bool((previous_status(before, num_experts, topology) == FINE).all())
