"""Relabelling: the same plan in other words, so that as many weights as can be stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.topology import Topology


def relabel(previous: Tensor, planned: Tensor, topology: Topology) -> Tensor:
    """`planned` with its nodes, the GPUs of each node and the slots of each GPU renumbered to write few slots.

    Nodes are paired by how many replicas they share, the pair that shares most first; then the GPUs of each pair of
    nodes alike. Experts that a GPU keeps stay in their slots; the others fill the free ones in the order they had.

    Args:
        previous: [L, P] int64, expert in each slot before; -1: none.
        planned: [L, P] int64.
        topology: counts of the cluster.

    Returns:
        [L, P] int64.

    Ties: the lowest node or GPU before, then the lowest of the plan; of equal experts, the lowest slots are kept.
    """
    num_layers, num_nodes = len(planned), topology.planned_nodes
    if num_nodes > 1:
        old, new = (slots.reshape(num_layers, num_nodes, -1) for slots in (previous, planned))
        node = pair_by_overlap(overlaps(old, new))
        planned = new.gather(1, node.unsqueeze(2).expand_as(new)).view(num_layers, -1)
    return relabel_gpus(previous, planned, topology)


def relabel_gpus(previous: Tensor, planned: Tensor, topology: Topology) -> Tensor:
    """As `relabel`, where every node keeps its number."""
    rows = len(planned) * topology.planned_nodes
    old, new = (slots.reshape(rows, topology.gpus_per_node, topology.slots_per_gpu) for slots in (previous, planned))
    gpu = pair_by_overlap(overlaps(old, new))
    new = new.gather(1, gpu.unsqueeze(2).expand_as(new))
    kept = occurrence(old) < times(old, new)  # [rows, d, S], slots whose expert stays
    stays = occurrence(new) < times(new, old)
    # Stable sorts of the flags list the free slots and the experts that come, both in slot order, before the others.
    free, coming = (flags.to(torch.int8).argsort(dim=2, stable=True) for flags in (kept, stays))
    moved = torch.empty_like(new).scatter_(2, free, new.gather(2, coming))
    return torch.where(kept, old, moved).view_as(planned)


def overlaps(old: Tensor, new: Tensor) -> Tensor:
    """[rows, m, m] int64: how many replicas pack k of `old` [rows, m, slots] and pack g of `new` share."""
    which = occurrence(new)
    shared = [
        (times(new, old[:, k : k + 1].expand_as(new)) > which).sum(2)
        for k in range(old.shape[1])  # all at once would be m times the memory
    ]
    return torch.stack(shared, 1)


def pair_by_overlap(overlap: Tensor) -> Tensor:
    """[rows, m] int64: the new pack that takes the place of each old one; the pair of most overlap first.

    Ties: the lowest old pack, then the lowest new one.
    """
    rows, m, _ = overlap.shape
    left = overlap.clone()
    partner = torch.empty(rows, m, dtype=torch.int64, device="cpu")
    row = torch.arange(rows, dtype=torch.int64, device="cpu")
    for _ in range(m):
        best = left.flatten(1).argmax(1)
        old, new = best // m, best % m
        partner[row, old] = new
        left[row, old] = -1
        left[row, :, new] = -1
    return partner


def occurrence(slots: Tensor) -> Tensor:
    """[..., n] int64: how many lower slots of the same pack hold the same expert."""
    n = slots.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device="cpu").tril(-1)
    return ((slots.unsqueeze(-1) == slots.unsqueeze(-2)) & lower).sum(-1)


def times(slots: Tensor, others: Tensor) -> Tensor:
    """[..., n] int64: how often the expert of each of `slots` [..., n] is among `others` [..., n] of the same pack."""
    return (slots.unsqueeze(-1) == others.unsqueeze(-2)).sum(-1)
