"""Replicate: which expert gets the next replica, pick by pick.

State of a call, one row per (layer, node):
    loads  [rows, e] float32, load of each expert
    counts   [rows, e] int64, replicas each expert has; raised in place
    expert   [rows, p] int64, the replica list: expert of each replica; filled in place
    rank     [rows, p] int64, the replica list: its number among the expert's replicas; filled in place

Every `pick_*` fills the places start .. stop - 1 of the replica list. Ties: lowest expert, unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import EPSILON_F32, ordered_mean, ordered_sum, per_replica, square_root, top_two
from eplb_triton.constants import EPSILON, dispersion_length, simulated_lengths, tenth


def pick_dhondt(loads: Tensor, counts: Tensor, expert: Tensor, rank: Tensor, start: int, stop: int) -> None:
    """D'Hondt: the expert of largest w/c."""
    load = per_replica(loads, counts)
    for place in range(start, stop):
        chosen = load.argmax(1, keepdim=True)
        _append(chosen, counts, expert, rank, place)
        # Only the chosen expert's quotient changes.
        load.scatter_(1, chosen, per_replica(loads.gather(1, chosen), counts.gather(1, chosen)))


def pick_sainte_lague(loads: Tensor, counts: Tensor, expert: Tensor, rank: Tensor, start: int, stop: int) -> None:
    """Sainte-Laguë: the expert of largest w/(2c - 1)."""
    for place in range(start, stop):
        chosen = per_replica(loads, 2 * counts - 1).argmax(1, keepdim=True)
        _append(chosen, counts, expert, rank, place)


def pick_peak_aware(loads: Tensor, counts: Tensor, expert: Tensor, rank: Tensor, start: int, stop: int) -> None:
    """Whichever of the D'Hondt and the Sainte-Laguë pick leaves the lower peak w/c; near ties: D'Hondt's unless
    its second peak is higher."""
    for place in range(start, stop):
        load = per_replica(loads, counts)
        dhondt = load.argmax(1, keepdim=True)
        sainte_lague = per_replica(loads, 2 * counts - 1).argmax(1, keepdim=True)
        second = _second_largest(load)
        new_d, new_s = _load_after(loads, counts, dhondt), _load_after(loads, counts, sainte_lague)
        peak_d, peak_s = torch.maximum(second, new_d), torch.maximum(second, new_s)
        below_d, below_s = torch.minimum(second, new_d), torch.minimum(second, new_s)
        near = (peak_d - peak_s).abs() <= EPSILON_F32
        take_d = (peak_d + EPSILON_F32 < peak_s) | (near & (below_d <= below_s))
        _append(torch.where(take_d, dhondt, sainte_lague), counts, expert, rank, place)


def pick_gated(loads: Tensor, counts: Tensor, expert: Tensor, rank: Tensor, start: int, stop: int) -> None:
    """As `pick_peak_aware`, with the true largest of the others, and D'Hondt's pick while loads are level.

    Ties of the Sainte-Laguë pick: smaller w/c, then lowest expert.
    """
    for place in range(start, stop):
        load = per_replica(loads, counts)
        dhondt = load.argmax(1, keepdim=True)
        quotient = per_replica(loads, 2 * counts - 1)
        tied = quotient == quotient.amax(1, keepdim=True)
        sainte_lague = torch.where(tied, load, torch.inf).argmin(1, keepdim=True)
        largest, second = load.gather(1, dhondt), _second_largest(load)
        others_s = torch.where(sainte_lague == dhondt, second, largest)
        new_d, new_s = _load_after(loads, counts, dhondt), _load_after(loads, counts, sainte_lague)
        peak_d, peak_s = torch.maximum(second, new_d), torch.maximum(others_s, new_s)
        below_d, below_s = torch.minimum(second, new_d), torch.minimum(others_s, new_s)
        mean = ordered_mean(load).to(torch.float32).unsqueeze(1)
        gate = (largest / torch.maximum(mean, EPSILON_F32) - 1).clamp(0, 1)
        near = (peak_d - peak_s).abs() <= EPSILON_F32
        below_near = (below_d - below_s).abs() <= EPSILON_F32
        rarer = counts.gather(1, dhondt) <= counts.gather(1, sainte_lague)
        take_d = (
            (gate <= EPSILON_F32)
            | (peak_d + EPSILON_F32 < peak_s)
            | (near & ((below_d + EPSILON_F32 < below_s) | (below_near & rarer)))
        )
        _append(torch.where(take_d, dhondt, sainte_lague), counts, expert, rank, place)


def fixed_tail(num_redundant: int) -> int:
    """T0: a tenth of the redundant replicas, rounded up, at least 1."""
    return tenth(num_redundant)


def dispersion_tail(loads: Tensor, num_redundant: int) -> int:
    """Tail length from how unequal loads are, on average over all rows of the call.

    A tenth of the redundant replicas, times the mean coefficient of variation held between 0.7 and 1.3, rounded
    half to even.
    """
    mean = ordered_mean(loads)
    if loads.shape[1] > 1:
        deviation = loads.to(torch.float64) - mean.unsqueeze(1)
        variance = ordered_sum(deviation * deviation) / (loads.shape[1] - 1)
    else:
        variance = torch.zeros_like(mean)
    variation = square_root(variance) / mean.clamp(min=EPSILON)
    return dispersion_length(num_redundant, ordered_mean(variation).item())


def simulated_tail(loads: Tensor, num_redundant: int) -> int:
    """Tail length of the lowest mean, over all rows of the call, of the peak w/c, among the fixed length and its
    two neighbours; ties: the shortest."""
    scores: dict[int, float] = {}
    for tail in simulated_lengths(num_redundant):
        counts = torch.ones(loads.shape, dtype=torch.int64, device="cpu")
        unused = counts.new_empty(loads.shape[0], num_redundant)
        pick_dhondt(loads, counts, unused, unused, 0, num_redundant - tail)
        pick_sainte_lague(loads, counts, unused, unused, num_redundant - tail, num_redundant)
        scores[tail] = ordered_mean(per_replica(loads, counts).amax(1)).item()
    return min(scores, key=scores.__getitem__)


def _append(chosen: Tensor, counts: Tensor, expert: Tensor, rank: Tensor, place: int) -> None:
    """Put the `chosen` [rows, 1] experts at `place` of the replica list and count them."""
    before = counts.gather(1, chosen)
    expert[:, place] = chosen.squeeze(1)
    rank[:, place] = before.squeeze(1)
    counts.scatter_(1, chosen, before + 1)


def _second_largest(load: Tensor) -> Tensor:
    """[rows, 1]: second largest, equal values counted twice; the only one where a row has one."""
    if load.shape[1] == 1:
        return load
    return load.gather(1, top_two(load)[:, 1:])


def _load_after(loads: Tensor, counts: Tensor, chosen: Tensor) -> Tensor:
    """[rows, 1]: w/(c + 1) of the `chosen` experts."""
    return per_replica(loads.gather(1, chosen), counts.gather(1, chosen) + 1)
