"""Fix-up where GPUs have two slots: moves of single replicas, judged on the largest pair of the best pairing."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import columns, indices, per_replica
from eplb_reference.replicate_waterfill import list_by_expert
from eplb_triton.constants import PAIR_GAIN

PAIR_GAIN_F32 = torch.tensor(PAIR_GAIN, dtype=torch.float32, device="cpu")


def move_paired(loads: Tensor, counts: Tensor, num_packs: int, moves: int, donors: int) -> None:
    """For packs of two: up to `moves` times, move a replica where that most lowers the largest pair.

    Replicas by load, the heaviest with the lightest, the second with the second last, and so on, is the best pairing of
    any counts; the largest of these pairs values them. A replica moves from one of the `donors` experts of smallest
    w/(c - 1) that have two, to an expert of the largest pair that has fewer than `num_packs`. A row stops when no move
    lowers its value by more than 1e-6 of it.

    Args:
        loads: [rows, e] float32.
        counts: [rows, e] int64 with a sum of 2 * `num_packs` in every row; changed in place.
        num_packs: GPUs of a row.
        moves: at most so many.
        donors: tried at each move.

    Ties: the first largest pair; the donor of smaller w/(c - 1), then the lower; the heavier receiver.
    """
    going = indices(loads.shape[0])
    for _ in range(moves):
        w, c = loads[going], counts[going]
        value, receivers = _largest_pair(w, c, num_packs)
        lighter = torch.where(c > 1, w / (c - 1), torch.inf)  # c = 1: w/0, unused
        best = torch.full_like(value, torch.inf)
        best_counts = c
        for donor in columns(lighter.argsort(dim=1, stable=True)[:, :donors]):
            for receiver in columns(receivers):
                allowed = (c.gather(1, donor) > 1) & (c.gather(1, receiver) < num_packs) & (donor != receiver)
                after = c.scatter_add(1, donor, -torch.ones_like(donor))
                after = torch.where(allowed, after.scatter_add(1, receiver, torch.ones_like(receiver)), c)
                new_value, _ = _largest_pair(w, after, num_packs)
                better = allowed & (new_value < best)
                best = torch.where(better, new_value, best)
                best_counts = torch.where(better, after, best_counts)
        gains = (best + PAIR_GAIN_F32 * value < value)[:, 0]
        going = going[gains]
        counts[going] = best_counts[gains]
        if len(going) == 0:
            break


def _largest_pair(loads: Tensor, counts: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Largest of the pairs of the best pairing [rows, 1] float32, and its experts [rows, 2], the heavier first."""
    expert, _ = list_by_expert(counts)
    replica_loads, order = per_replica(loads, counts).gather(1, expert).sort(dim=1, descending=True, stable=True)
    pairs = replica_loads[:, :num_packs] + replica_loads.flip(1)[:, :num_packs]
    first = pairs.argmax(1, keepdim=True)
    pair = torch.cat((first, 2 * num_packs - 1 - first), 1)
    return pairs.gather(1, first), expert.gather(1, order.gather(1, pair))
