"""Waterfill: replica counts from a common level that every replica's load is brought down to."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import columns, indices, per_replica, top_two
from eplb_triton.constants import BISECTIONS, waterfill_tail


def waterfill_counts(loads: Tensor, num_replicas: int) -> Tensor:
    """Replica counts [rows, e] int64 of `loads` [rows, e] float32 that sum to `num_replicas` in every row.

    The level is the lowest (by bisection) that `num_replicas` replicas can reach; what they leave over goes to
    the largest w/c, the last tenth of the redundant replicas one by one, judged on the peak they leave. Idle rows
    (all loads 0) get their replicas spread evenly. Ties: lowest expert.
    """
    num_experts = loads.shape[1]
    num_redundant = num_replicas - num_experts
    if num_redundant == 0:
        return torch.ones(loads.shape, dtype=torch.int64, device="cpu")
    even = num_replicas // num_experts + (indices(num_experts) < num_replicas % num_experts).to(torch.int64)
    idle = (loads == 0).all(1, keepdim=True)
    counts = torch.where(idle, even, _counts_at(loads, _level(loads, num_replicas)))
    extras = num_replicas - counts.sum(1)
    tail = extras.clamp(max=waterfill_tail(num_redundant))
    _add_bulk(loads, counts, extras - tail)
    _add_tail(loads, counts, tail)
    return counts


def list_by_expert(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The replica list of `counts` [rows, e]: expert 0's replicas, then expert 1's, and so on.

    Returns:
        expert, rank: [rows, p] int64, p = the sum of every row of `counts`.
    """
    ends = counts.cumsum(1)
    place = indices(int(ends[0, -1])).expand(counts.shape[0], -1).contiguous()
    expert = torch.searchsorted(ends, place, right=True)
    return expert, place - (ends - counts).gather(1, expert)


def _level(loads: Tensor, num_replicas: int) -> Tensor:
    """[rows, 1] float64: the lowest level found at which at most `num_replicas` replicas are needed."""
    high = loads.amax(1, keepdim=True).to(torch.float64).clamp(min=1)
    low = torch.zeros_like(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = _counts_at(loads, middle).sum(1, keepdim=True) <= num_replicas
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high


def _counts_at(loads: Tensor, level: Tensor) -> Tensor:
    """Replicas that bring every expert's w/c down to `level`, at least one each. At most 2**40 (bisection steps),
    so exact in int64."""
    return (loads / level.to(torch.float32)).ceil().to(torch.int64).clamp(min=1)


def _add_bulk(loads: Tensor, counts: Tensor, bulk: Tensor) -> None:
    """Add `bulk` [rows] replicas in place, one each to the experts of largest w/c, round after round."""
    num_experts = loads.shape[1]
    while bool((bulk > 0).any()):
        taken = bulk.clamp(max=num_experts)
        order = per_replica(loads, counts).argsort(dim=1, descending=True, stable=True)
        counts.scatter_add_(1, order, (indices(num_experts) < taken.unsqueeze(1)).to(torch.int64))
        bulk = bulk - taken


def _add_tail(loads: Tensor, counts: Tensor, tail: Tensor) -> None:
    """Add `tail` [rows] replicas in place, one by one: whichever of the next D'Hondt and Sainte-Laguë picks has the
    smallest key (peak, largest of the others, -w); ties: D'Hondt's."""
    if loads.shape[1] == 1:
        counts += tail.unsqueeze(1)
        return
    for step in range(int(tail.max())):
        load = per_replica(loads, counts)
        after = per_replica(loads, counts + 1)
        largest, second = columns(load.gather(1, top_two(load)))
        heaviest = load.argmax(1, keepdim=True)
        dhondt = after.argmax(1, keepdim=True)
        sainte_lague = per_replica(loads, 2 * counts + 1).argmax(1, keepdim=True)
        others_d = torch.where(dhondt == heaviest, second, largest)
        others_s = torch.where(sainte_lague == heaviest, second, largest)
        peak_d = torch.maximum(others_d, after.gather(1, dhondt))
        peak_s = torch.maximum(others_s, after.gather(1, sainte_lague))
        heavier = loads.gather(1, sainte_lague) > loads.gather(1, dhondt)
        take_s = (peak_s < peak_d) | ((peak_s == peak_d) & ((others_s < others_d) | ((others_s == others_d) & heavier)))
        chosen = torch.where(take_s, sainte_lague, dhondt)
        counts.scatter_add_(1, chosen, (step < tail).to(torch.int64).unsqueeze(1))
