"""Fix-up: move single replicas from one expert to another where that is judged to lower the peak w/c."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from eplb_reference.arith import bottom_two, columns, per_replica, top_two
from eplb_triton.constants import EPSILON
from eplb_triton.policy import Donors, PeakEstimate, Tie


def move_replicas(
    loads: Tensor,  # [rows, e >= 2] float32
    counts: Tensor,  # [rows, e] int64, changed in place
    expert: Tensor | None,  # [rows, p] int64, the replica list, changed in place; None: there is no list yet
    rank: Tensor | None,  # [rows, p] int64
    moves: int,
    donors: Donors,
    peak: PeakEstimate,
    tie: Tie,
) -> None:
    """Make at most `moves` moves a row: the last-ranked replica of a donor becomes a replica of a receiver, in its
    place in the replica list. Stops where no candidate lowers the judged peak.

    Ties between candidates: as `tie` says, candidates in the order of the heavier donor, then the lighter receiver.
    """
    for _ in range(moves):
        load = per_replica(loads, counts)
        donor, receiver = _best_move(loads, counts, load, donors, peak, tie)
        _apply(counts, expert, rank, donor, receiver)


def _best_move(
    loads: Tensor, counts: Tensor, load: Tensor, donors: Donors, peak: PeakEstimate, tie: Tie
) -> tuple[Tensor, Tensor]:
    """Donor and receiver [rows, 1] of each row's best move; -1 where there is none."""
    largest = load.amax(1, keepdim=True).to(torch.float64)
    # -inf marks experts that cannot give; a row may have fewer than two that can.
    giving = torch.where(counts > 1, load, -torch.inf) if donors == "replicated" else load
    receivers = columns(bottom_two(load))
    best = (torch.full_like(largest, torch.inf),) * 2
    best_pair = (torch.full_like(receivers[0], -1),) * 2
    for donor, receiver in product(columns(top_two(giving)), receivers):
        score = _score(loads, counts, load, donor, receiver, peak)
        counted = (counts.gather(1, donor) > 1) & (donor != receiver) & (score[0] + EPSILON < largest)
        better = counted & _precedes(score, (donor, receiver), best, best_pair, tie)
        best = torch.where(better, score[0], best[0]), torch.where(better, score[1], best[1])
        best_pair = torch.where(better, donor, best_pair[0]), torch.where(better, receiver, best_pair[1])
    return best_pair


def _score(
    loads: Tensor, counts: Tensor, load: Tensor, donor: Tensor, receiver: Tensor, peak: PeakEstimate
) -> tuple[Tensor, Tensor]:
    """(peak, second peak) [rows, 1] float64 that a move is judged to leave."""
    w_d, w_r = loads.gather(1, donor), loads.gather(1, receiver)
    c_d, c_r = counts.gather(1, donor) - 1, counts.gather(1, receiver) + 1
    if peak == "exact":
        after = load.scatter(1, donor, per_replica(w_d, c_d)).scatter(1, receiver, per_replica(w_r, c_r))
        first, second = columns(after.gather(1, top_two(after)).to(torch.float64))
        return first, second
    heaviest, second_heaviest = columns(top_two(load))
    others = load.gather(1, second_heaviest)
    if peak == "others":
        others = torch.where(donor == heaviest, others, load.gather(1, heaviest))
    new_d, new_r = w_d.to(torch.float64) / c_d, w_r.to(torch.float64) / c_r
    terms = torch.cat((others.to(torch.float64), new_d, new_r), 1).sort(1).values
    return terms[:, 2:], terms[:, 1:2]


def _precedes(
    score: tuple[Tensor, Tensor],
    pair: tuple[Tensor, Tensor],
    best: tuple[Tensor, Tensor],
    best_pair: tuple[Tensor, Tensor],
    tie: Tie,
) -> Tensor:
    """Whether a later candidate replaces the best so far (score infinite: none so far)."""
    lower = score[0] < best[0]
    if tie == "first":
        return lower
    if tie == "second_peak":
        return lower | (((score[0] - best[0]).abs() <= EPSILON) & (score[1] < best[1]))
    earlier = (pair[0] < best_pair[0]) | ((pair[0] == best_pair[0]) & (pair[1] < best_pair[1]))
    return lower | ((score[0] == best[0]) & ((score[1] < best[1]) | ((score[1] == best[1]) & earlier)))


def _apply(counts: Tensor, expert: Tensor | None, rank: Tensor | None, donor: Tensor, receiver: Tensor) -> None:
    """Move one replica in every row whose `donor` is not -1."""
    moved = donor >= 0
    one = moved.to(torch.int64)
    donor, receiver = donor.clamp(min=0), receiver.clamp(min=0)
    if expert is not None and rank is not None:
        last = moved & (expert == donor) & (rank == counts.gather(1, donor) - 1)
        rank.copy_(torch.where(last, counts.gather(1, receiver), rank))
        expert.copy_(torch.where(last, receiver, expert))
    counts.scatter_add_(1, donor, -one)
    counts.scatter_add_(1, receiver, one)
