"""Fix-up: move single replicas between experts after replication.

loads [e] float32, counts [e] int64 and the replica list (expert, rank) [p] int64 of one row. A replica load is w / c.
donors, peak and tie are integers of fields.py.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.constants import EPSILON
from eplb_triton.cpu.arith import Floats, Ints, divide
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.fields import DONORS_REPLICATED, PEAK_EXACT, PEAK_OTHERS, TIE_LEXICOGRAPHIC, TIE_SECOND_PEAK

NONE = np.int64(-1)
ANY = np.int64(0)
REPLICATED = np.int64(1)


@stage
def _heaviest_two(replica_loads: Floats, counts: Ints, above: int) -> tuple[int, int]:
    """The experts of the two largest replica loads among those of more than `above` replicas, NONE where there is none;
    ties: lowest."""
    first, second = NONE, NONE
    for i in range(replica_loads.size):
        if counts[i] <= above:
            continue
        if first == NONE or replica_loads[i] > replica_loads[first]:
            first, second = i, first
        elif second == NONE or replica_loads[i] > replica_loads[second]:
            second = i
    return first, second


@stage
def _lightest_two(replica_loads: Floats) -> tuple[int, int]:
    """The experts of the two smallest replica loads; ties: lowest."""
    first, second = 0, NONE
    for i in range(1, replica_loads.size):
        if replica_loads[i] < replica_loads[first]:
            first, second = i, first
        elif second == NONE or replica_loads[i] < replica_loads[second]:
            second = i
    return first, second


@stage
def _largest_two_after(
    replica_loads: Floats, donor: int, new_donor: np.float32, receiver: int, new_receiver: np.float32
) -> tuple[float, float]:
    """The largest and second largest replica load once two of them have changed."""
    first, second = max(new_donor, new_receiver), min(new_donor, new_receiver)
    for i in range(replica_loads.size):
        if i not in (donor, receiver):
            second = max(second, min(first, replica_loads[i]))
            first = max(first, replica_loads[i])
    return np.float64(first), np.float64(second)


@stage
def _judge(
    loads: Floats, counts: Ints, replica_loads: Floats, donor: int, receiver: int, heaviest: int, second: int, peak: int
) -> tuple[float, float]:
    """The peak after a move as `peak` sees it, and the second peak, which breaks ties."""
    if peak == PEAK_EXACT:
        new_donor = divide(loads[donor], counts[donor] - 1)
        new_receiver = divide(loads[receiver], counts[receiver] + 1)
        return _largest_two_after(replica_loads, donor, new_donor, receiver, new_receiver)
    others = np.float64(replica_loads[heaviest if peak == PEAK_OTHERS and donor != heaviest else second])
    giving = np.float64(loads[donor]) / np.float64(counts[donor] - 1)
    taking = np.float64(loads[receiver]) / np.float64(counts[receiver] + 1)
    middle = max(min(others, giving), min(max(others, giving), taking))
    return max(others, giving, taking), middle


@stage
def _better(
    peak: float, second: float, donor: int, receiver: int, best: tuple[float, float, int, int], tie: int
) -> bool:
    best_peak, best_second, best_donor, best_receiver = best
    if peak < best_peak:
        return True
    if tie == TIE_SECOND_PEAK:
        return abs(peak - best_peak) <= EPSILON and second < best_second
    if tie == TIE_LEXICOGRAPHIC and peak == best_peak:
        if second != best_second:
            return second < best_second
        return donor < best_donor or (donor == best_donor and receiver < best_receiver)
    return False


@stage
def _best_move(
    loads: Floats, counts: Ints, replica_loads: Floats, donors: int, peak: int, tie: int
) -> tuple[float, float, int, int]:
    """(peak, second peak, donor, receiver) of the move to make, NONE for the donor if there is none."""
    heaviest, second = _heaviest_two(replica_loads, counts, ANY)
    above = REPLICATED if donors == DONORS_REPLICATED else ANY
    best = (np.inf, np.inf, NONE, NONE)
    for donor in _heaviest_two(replica_loads, counts, above):
        if donor == NONE or counts[donor] == 1:
            continue
        for receiver in _lightest_two(replica_loads):
            if receiver == donor:
                continue
            largest, middle = _judge(loads, counts, replica_loads, donor, receiver, heaviest, second, peak)
            if largest + EPSILON < np.float64(replica_loads[heaviest]) and _better(
                largest, middle, donor, receiver, best, tie
            ):
                best = (largest, middle, donor, receiver)
    return best


@stage
def move_replicas(
    loads: Floats,
    counts: Ints,
    expert: Ints,
    rank: Ints,
    moves: int,
    donors: int,
    peak: int,
    tie: int,
    replica_loads: Floats,
) -> None:
    """Move up to `moves` replicas, each from a heavy expert to a light one, where the peak is judged to fall.

    Changes `counts` and the replica list; `expert` and `rank` may be empty, for a list made afterwards.
    replica_loads [e] is scratch.
    """
    e = loads.size
    if e < 2:
        return
    for _ in range(moves):
        for i in range(e):
            replica_loads[i] = divide(loads[i], counts[i])
        _, _, donor, receiver = _best_move(loads, counts, replica_loads, donors, peak, tie)
        if donor == NONE:
            return
        for k in range(expert.size):
            if expert[k] == donor and rank[k] == counts[donor] - 1:
                expert[k] = receiver
                rank[k] = counts[receiver]
                break
        counts[donor] -= 1
        counts[receiver] += 1
