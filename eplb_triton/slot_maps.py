"""What follows from the slot map alone: the rank of every replica, the counts, and the slots of each expert.

PyTorch on the device of the map, in stream order, without a wait: for placements that no planner wrote.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eplb_triton.placement_rules import check_alike
from eplb_triton.status import GOOD, NO_ROOM

if TYPE_CHECKING:
    from eplb_triton.placement import Placement


class Moved(NamedTuple):
    """What changes from one placement to the next, per layer."""

    slots: Tensor  # [L] int64, physical slots whose expert changed
    fetches: Tensor  # [L] int64, experts that a GPU must fetch, over all GPUs: it did not hold them before


def rank_replicas(phy2log: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """phyrank [L, P], replicas of an expert ranked in slot order, and logcnt [L, E], of the dtype of `phy2log`.

    Args:
        phy2log: [L, P] integer, experts 0 … E - 1, or -1 for a slot that holds none: it has rank -1 and is not counted.
        num_experts: E.
    """
    experts = phy2log.long()
    held = experts >= 0
    label = torch.where(held, experts, num_experts)  # empty slots: one expert more, cut off again
    count = torch.zeros(len(label), num_experts + 1, dtype=torch.int64, device=label.device)
    count.scatter_add_(1, label, torch.ones_like(label))
    by_expert = label.argsort(dim=1, stable=True)
    first = (count.cumsum(1) - count).gather(1, label.gather(1, by_expert))
    place = torch.arange(label.shape[1], dtype=torch.int64, device=label.device)
    rank = torch.empty_like(label).scatter_(1, by_expert, place - first)
    return torch.where(held, rank, -1).to(phy2log.dtype), count[:, :num_experts].to(phy2log.dtype)


def slots_of_experts(phy2log: Tensor, phyrank: Tensor, num_experts: int, width: int) -> Tensor:
    """log2phy [L, E, width] of the dtype of `phy2log`: slots of each expert by replica rank, padded with -1.

    Args:
        phy2log: [L, P] integer; slots of -1 are no expert's.
        phyrank: [L, P] integer.
        num_experts: E.
        width: replicas of an expert that there is room for; those ranked behind are left out.
    """
    layers, slots = phy2log.shape
    fits = (phy2log >= 0) & (phyrank < width)
    place = torch.where(fits, phy2log.long() * width + phyrank, num_experts * width)  # the others: one place, cut off
    table = torch.full((layers, num_experts * width + 1), -1, dtype=phy2log.dtype, device=phy2log.device)
    slot = torch.arange(slots, dtype=phy2log.dtype, device=phy2log.device).expand(layers, -1)
    return table.scatter_(1, place, slot)[:, :-1].reshape(layers, num_experts, width)


def refresh(placement: Placement) -> None:
    """Work out phyrank, logcnt, bad and log2phy anew from phy2log."""
    rank, count = rank_replicas(placement.phy2log, placement.num_experts)
    placement.phyrank.copy_(rank)
    placement.logcnt.copy_(count)
    if placement.bad is not None:
        placement.bad.fill_(GOOD)
    refresh_log2phy(placement)


def refresh_log2phy(placement: Placement) -> None:
    """Work out log2phy, where there is one, and what of it goes into bad."""
    if placement.log2phy is None:
        return
    width = placement.log2phy.shape[2]
    placement.log2phy.copy_(slots_of_experts(placement.phy2log, placement.phyrank, placement.num_experts, width))
    if placement.bad is not None:
        placement.bad.masked_fill_((placement.logcnt > width).any(1, keepdim=True), NO_ROOM)


def moved(placement: Placement, previous: Placement) -> Moved:
    """What has to move: see `Placement.moved`."""
    check_alike(placement, previous)
    changed = placement.phy2log != previous.phy2log.to(placement.phy2log.device)
    return Moved(changed.sum(1), fetched_experts(placement, previous))


def fetched_experts(placement: Placement, previous: Placement) -> Tensor:
    """[L] int64: experts that a GPU did not hold in `previous`, over all GPUs; a second replica on a GPU is none."""
    held, held_before = _experts_of_gpus(placement), _experts_of_gpus(previous).to(placement.phy2log.device)
    at = torch.searchsorted(held_before, held).clamp(max=held.shape[1] - 1)
    new = (held_before.gather(1, at) != held) & (held % (placement.num_experts + 1) > 0)
    new[:, 1:] &= held[:, 1:] != held[:, :-1]
    return new.sum(1)


def doubled_replicas(placement: Placement) -> Tensor:
    """[L] int64: replicas that share their GPU with another replica of their expert."""
    held = _experts_of_gpus(placement)
    again = (held[:, 1:] == held[:, :-1]) & (held[:, 1:] % (placement.num_experts + 1) > 0)
    shared = torch.zeros_like(held, dtype=torch.bool)
    shared[:, 1:] |= again
    shared[:, :-1] |= again
    return shared.sum(1)


def fingerprint_of(placement: Placement) -> str:
    """16 hex digits of SHA-256 over counts and maps: see `Placement.fingerprint`."""
    topology = placement.topology
    counts = (topology.num_replicas, topology.num_groups, topology.num_nodes, topology.num_gpus)
    digest = hashlib.sha256(repr(("eplb_triton placement 1", *counts, *placement.logcnt.shape)).encode())
    for slots in (placement.phy2log, placement.phyrank):
        digest.update(slots.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _experts_of_gpus(placement: Placement) -> Tensor:
    """[L, P] int64, ascending: GPU · (E + 1) + expert + 1 of every slot, expert -1 where it holds none."""
    topology = placement.topology
    slots = torch.arange(topology.num_replicas, dtype=torch.int64, device=placement.phy2log.device)
    gpu = slots // topology.slots_per_gpu
    return (gpu * (placement.num_experts + 1) + placement.phy2log.long() + 1).sort(1).values
