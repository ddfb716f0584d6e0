"""Relabelling: the same plan in other words, so that as many weights as can be stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from eplb_triton.cpu.arith import Flags, Ints, flags, int_rows
from eplb_triton.cpu.compiled import entry_point, stage
from eplb_triton.topology import Topology

NONE = np.int64(-1)


def relabel(previous: torch.Tensor, planned: torch.Tensor, topology: Topology) -> torch.Tensor:
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
    new = planned.contiguous().clone()
    if new.numel():
        num_experts = int(new.max()) + 1
        sizes = topology.planned_nodes, topology.gpus_per_node, num_experts
        compiled_relabel()(previous.contiguous().numpy(), new.numpy(), *sizes)
    return new


@cache
def compiled_relabel() -> Callable[..., None]:
    """The entry point that renames the plans of many layers in place."""

    def relabel_rows(previous: Ints, planned: Ints, num_nodes: int, num_gpus: int, num_experts: int) -> None:
        for layer in range(planned.shape[0]):
            old, new = previous[layer], planned[layer]
            if num_nodes > 1:
                rename_packs(old, new, num_nodes, num_experts)
            relabel_gpus(old, new, num_nodes, num_gpus, num_experts)

    signature = "void(int64[:, ::1], int64[:, ::1], int64, int64, int64)"
    return entry_point(relabel_rows, signature, "all", "the renumbering of plans, about 3 s")


@stage
def relabel_gpus(previous: Ints, planned: Ints, num_nodes: int, num_gpus: int, num_experts: int) -> None:
    """As `relabel`, of one layer and in place, where every node keeps its number."""
    p, s = planned.size // num_nodes, planned.size // (num_nodes * num_gpus)
    kept = flags(s)
    for node in range(num_nodes):
        old, new = previous[node * p : (node + 1) * p], planned[node * p : (node + 1) * p]
        rename_packs(old, new, num_gpus, num_experts)
        for first in range(0, p, s):
            _keep_slots(old[first : first + s], new[first : first + s], kept)


@stage
def rename_packs(old: Ints, new: Ints, num_packs: int, num_experts: int) -> None:
    """Give each pack of `new` [slots] the number of one of `old` that shares many experts with it, in place.

    The pair of most overlap first; ties: the lowest old pack, then the lowest new one.
    """
    size = new.size // num_packs
    overlap, times = int_rows(num_packs, num_packs), np.zeros(num_experts, np.int64)
    for k in range(num_packs):
        for g in range(num_packs):
            overlap[k, g] = _overlap(old[k * size : (k + 1) * size], new[g * size : (g + 1) * size], times)
    partner = np.full(num_packs, NONE)
    taken = np.zeros(num_packs, np.bool_)
    for shared in range(size, -1, -1):
        for k in range(num_packs):
            if partner[k] != NONE:
                continue
            for g in range(num_packs):
                if not taken[g] and overlap[k, g] == shared:
                    partner[k], taken[g] = g, True
                    break
    planned = new.copy()
    for k in range(num_packs):
        new[k * size : (k + 1) * size] = planned[partner[k] * size : (partner[k] + 1) * size]


@stage
def _overlap(old: Ints, new: Ints, times: Ints) -> int:
    """How many replicas two packs share; times [E]: zeros, and zeros again afterwards."""
    shared = 0
    for i in range(new.size):
        times[new[i]] += 1
    for i in range(old.size):
        if 0 <= old[i] < times.size and times[old[i]] > 0:
            times[old[i]] -= 1
            shared += 1
    for i in range(new.size):
        times[new[i]] = 0
    return shared


@stage
def _keep_slots(old: Ints, new: Ints, kept: Flags) -> None:
    """Put the experts that a GPU keeps into their slots, the others into the free ones in the order of `new`, in
    place; kept [s]: room."""
    planned = new.copy()
    for i in range(old.size):
        kept[i] = _occurs(old, i) < _count(planned, old[i])
    free = 0
    for i in range(old.size):
        if _occurs(planned, i) >= _count(old, planned[i]):
            while kept[free]:
                free += 1
            new[free] = planned[i]
            free += 1
    for i in range(old.size):
        if kept[i]:
            new[i] = old[i]


@stage
def _occurs(slots: Ints, i: int) -> int:
    """How many lower slots hold the same expert."""
    return _count(slots[:i], slots[i])


@stage
def _count(slots: Ints, expert: int) -> int:
    times = 0
    for k in range(slots.size):
        times += 1 if slots[k] == expert else 0
    return times
