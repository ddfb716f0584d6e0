"""Replicate: which expert gets each redundant replica of a row.

State of a row:
    loads  [e] float32, load of each expert
    counts   [e] int64, replicas each expert has; raised in place
    expert   [p] int64, the replica list: expert of each replica; filled in place
    rank     [p] int64, the replica list: its number among the expert's replicas; filled in place
    trees    [3, blocks, BRANCHES] int64, scratch

A replica load is w / c.
"""

from __future__ import annotations

import numpy as np

from eplb_triton import constants
from eplb_triton.cpu.arith import Floats, Ints, divide, doubles, ints, ordered_sum
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.tournament import (
    BRANCHES,
    DHONDT,
    SAINTE_LAGUE,
    Divisor,
    fill_quotients,
    key_expert,
    key_load,
    largest_two,
    new_trees,
    refresh_quotient,
)

EPSILON = np.float32(constants.EPSILON)
LEAST_VARIATION, MOST_VARIATION = constants.VARIATION_RANGE
ONE_TREE = np.int64(1)
ZERO = np.float32(0)
ONE = np.float32(1)


@stage
def _append(choice: int, k: int, counts: Ints, expert: Ints, rank: Ints) -> None:
    expert[k] = choice
    rank[k] = counts[choice]
    counts[choice] += 1


@stage
def _pick_largest(
    loads: Floats, counts: Ints, expert: Ints, rank: Ints, start: int, stop: int, divisor: Divisor, tree: Ints
) -> None:
    if start == stop:
        return
    top = fill_quotients(loads, counts, divisor, tree)
    for k in range(start, stop):
        choice = key_expert(top)
        _append(choice, k, counts, expert, rank)
        top = refresh_quotient(loads, counts, divisor, tree, choice)


@stage
def _refresh_both(loads: Floats, counts: Ints, dhondt: int, choice: int, trees: Ints) -> tuple[int, int]:
    """The winners of both tournaments after `choice` got a replica; D'Hondt's own was taken out of the first."""
    top = refresh_quotient(loads, counts, DHONDT, trees[0], dhondt)
    if choice != dhondt:
        top = refresh_quotient(loads, counts, DHONDT, trees[0], choice)
    return top, refresh_quotient(loads, counts, SAINTE_LAGUE, trees[1], choice)


@stage
def pick_dhondt(loads: Floats, counts: Ints, expert: Ints, rank: Ints, start: int, stop: int, trees: Ints) -> None:
    """Fill places start .. stop-1 of the replica list, each with the expert of largest w / c; ties: lowest."""
    _pick_largest(loads, counts, expert, rank, start, stop, DHONDT, trees[0])


@stage
def pick_sainte_lague(
    loads: Floats, counts: Ints, expert: Ints, rank: Ints, start: int, stop: int, trees: Ints
) -> None:
    """Fill places start .. stop-1, each with the expert of largest w / (2c - 1); ties: lowest."""
    _pick_largest(loads, counts, expert, rank, start, stop, SAINTE_LAGUE, trees[0])


@stage
def pick_peak_aware(loads: Floats, counts: Ints, expert: Ints, rank: Ints, start: int, stop: int, trees: Ints) -> None:
    """Fill places start .. stop-1, each with the one of the two picks that leaves the smaller largest replica load.

    The Sainte-Laguë pick's peak is taken against the second largest replica load too, whichever expert it is.
    """
    if start == stop:
        return
    e = loads.size
    top_d = fill_quotients(loads, counts, DHONDT, trees[0])
    top_s = fill_quotients(loads, counts, SAINTE_LAGUE, trees[1])
    for k in range(start, stop):
        dhondt, sainte_lague = key_expert(top_d), key_expert(top_s)
        _, second = largest_two(top_d, trees[0], e)
        new_d = divide(loads[dhondt], counts[dhondt] + 1)
        new_s = divide(loads[sainte_lague], counts[sainte_lague] + 1)
        peak_d, peak_s = max(second, new_d), max(second, new_s)
        take_d = peak_d + EPSILON < peak_s or (
            abs(peak_d - peak_s) <= EPSILON and min(second, new_d) <= min(second, new_s)
        )
        _append(dhondt if take_d else sainte_lague, k, counts, expert, rank)
        top_d, top_s = _refresh_both(loads, counts, dhondt, expert[k], trees)


@stage
def _mean_and_tied(top_s: int, trees: Ints, num_experts: int) -> tuple[np.float32, int]:
    """The mean replica load, and of the experts of largest Sainte-Laguë quotient the one of smallest replica load.

    ties: lowest
    """
    total = 0.0
    choice = key_expert(top_s)
    for i in range(num_experts):
        block, branch = i // BRANCHES, i % BRANCHES
        replica_load = key_load(trees[0, block, branch])
        total += np.float64(replica_load)
        if trees[1, block, branch] >> 32 == top_s >> 32 and replica_load < key_load(
            trees[0, choice // BRANCHES, choice % BRANCHES]
        ):
            choice = i
    return np.float32(total / num_experts), choice


@stage
def pick_gated(loads: Floats, counts: Ints, expert: Ints, rank: Ints, start: int, stop: int, trees: Ints) -> None:
    """Fill places start .. stop-1 as `pick_peak_aware`, but D'Hondt wherever the replica loads are level.

    A step takes the ordered mean of all replica loads, so it is linear in the experts whatever is done about the rest.
    """
    if start == stop:
        return
    e = loads.size
    top_d = fill_quotients(loads, counts, DHONDT, trees[0])
    top_s = fill_quotients(loads, counts, SAINTE_LAGUE, trees[1])
    for k in range(start, stop):
        dhondt = key_expert(top_d)
        mean, sainte_lague = _mean_and_tied(top_s, trees, e)
        largest, second = largest_two(top_d, trees[0], e)
        gamma = min(max(largest / max(mean, EPSILON) - ONE, ZERO), ONE)
        new_d = divide(loads[dhondt], counts[dhondt] + 1)
        new_s = divide(loads[sainte_lague], counts[sainte_lague] + 1)
        others_s = second if sainte_lague == dhondt else largest
        peak_d, second_d = max(second, new_d), min(second, new_d)
        peak_s, second_s = max(others_s, new_s), min(others_s, new_s)
        fewer = second_d + EPSILON < second_s or (
            abs(second_d - second_s) <= EPSILON and counts[dhondt] <= counts[sainte_lague]
        )
        take_d = gamma <= EPSILON or peak_d + EPSILON < peak_s or (abs(peak_d - peak_s) <= EPSILON and fewer)
        _append(dhondt if take_d else sainte_lague, k, counts, expert, rank)
        top_d, top_s = _refresh_both(loads, counts, dhondt, expert[k], trees)


@stage
def fixed_tail(num_redundant: int) -> int:
    """T0, the length of a tail that the loads do not change."""
    return max(1, (num_redundant + 9) // 10)


@stage
def _variation(loads: Floats) -> float:
    """The coefficient of variation of one row, float64, two passes; an idle row's is 0."""
    e = loads.size
    if e == 1:
        return 0.0
    mean = ordered_sum(loads) / e
    squares = 0.0
    for i in range(e):
        difference = np.float64(loads[i]) - mean
        squares += difference * difference
    return float(np.sqrt(squares / (e - 1)) / max(mean, constants.EPSILON))


@stage
def dispersion_tail(loads: Floats, num_redundant: int) -> int:
    """The tail length of `loads` [rows, experts], longer where the rows' loads vary more, one for all rows."""
    total = 0.0
    for row in range(loads.shape[0]):
        total += _variation(loads[row])
    scale = min(max(total / loads.shape[0], LEAST_VARIATION), MOST_VARIATION)
    length: int = np.int64(np.rint(0.10 * num_redundant * scale))  # half to even
    return min(max(length, 1), num_redundant)


@stage
def _largest_replica_load(loads: Floats, counts: Ints) -> np.float32:
    largest: np.float32 = ZERO
    for i in range(loads.size):
        largest = max(largest, divide(loads[i], counts[i]))
    return largest


@stage
def simulated_tail(loads: Floats, num_redundant: int) -> int:
    """The tail length near T0 whose picks leave the smallest mean over the rows of `loads` [rows, experts] of
    a row's largest replica load, one for all rows; ties: the shortest."""
    rows, e = loads.shape
    fixed = fixed_tail(num_redundant)
    shortest, longest = max(1, fixed - 1), min(num_redundant, fixed + 1)
    trees = new_trees(ONE_TREE, e)
    counts, trial = ints(e), ints(e)
    expert, rank = ints(num_redundant), ints(num_redundant)
    totals = doubles(longest - shortest + 1)
    totals[:] = 0
    for row in range(rows):
        counts[:] = 1
        picked = np.int64(0)
        # from the longest tail down, so that a candidate goes on from the D'Hondt picks of the one before
        for length in range(longest, shortest - 1, -1):
            head = num_redundant - length
            pick_dhondt(loads[row], counts, expert, rank, picked, head, trees)
            picked = head
            for i in range(e):
                trial[i] = counts[i]
            pick_sainte_lague(loads[row], trial, expert, rank, head, num_redundant, trees)
            totals[length - shortest] += np.float64(_largest_replica_load(loads[row], trial))
    best = 0
    for candidate in range(1, totals.size):
        if totals[candidate] / rows < totals[best] / rows:
            best = candidate
    return shortest + best
