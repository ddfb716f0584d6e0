"""Refine: swap items between the heaviest packs and the lightest after packing.

loads [n] float32 of the items; pack and slot [n] int64 of each item, changed; work (see new_work) and
totals [num_packs] float64, the pack loads, are scratch.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles, Floats, Ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.swaps import (
    NONE,
    heaviest_pack,
    heaviest_two_items,
    imbalance,
    lightest_two_items,
    lightest_two_packs,
    load_packs,
    next_lightest_pack,
    swap_items,
)

CLOSE = 1e-9
EPSILON = 1e-12


@stage
def _score(gap: float, weight_i: np.float32, weight_j: np.float32) -> float:
    """The gap between two packs after swapping an item of the heavy one with one of the light one."""
    difference: float = np.float64(weight_i) - np.float64(weight_j)
    return abs(gap - 2.0 * difference)


@stage
def _nearest_pair(
    loads: Floats, heavy: int, light: int, gap: float, capacity: int, members: Ints
) -> tuple[float, int, int]:
    """The smallest score over all pairs of items of two packs, and its pair; ties: lowest i, then lowest j."""
    best, best_i, best_j = np.inf, NONE, NONE
    for at_i in range(heavy * capacity, (heavy + 1) * capacity):
        i = members[at_i]
        for at_j in range(light * capacity, (light + 1) * capacity):
            j = members[at_j]
            score = _score(gap, loads[i], loads[j])
            if score < best or (score == best and (i < best_i or (i == best_i and j < best_j))):
                best, best_i, best_j = score, i, j
    return best, best_i, best_j


@stage
def refine_nearest(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, lights: int, work: Ints, totals: Doubles
) -> None:
    """Swap up to `steps` times the pair that best levels the heaviest pack with one of the `lights` lightest."""
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, totals)
    for _ in range(steps):
        heavy = heaviest_pack(totals, num_packs)
        lightest = lightest_two_packs(totals, num_packs, NONE)
        best, best_gap, best_i, best_j = np.inf, 0.0, NONE, NONE
        for nth in range(lights):
            gap = totals[heavy] - totals[lightest[nth]]
            if lightest[nth] == heavy or gap <= CLOSE:
                continue
            score, i, j = _nearest_pair(loads, heavy, lightest[nth], gap, capacity, members)
            if score < best:
                best, best_gap, best_i, best_j = score, gap, i, j
        if not best < best_gap - CLOSE:
            return
        swap_items(best_i, best_j, loads, pack, slot, capacity, members, totals)


@stage
def _corner_pair(
    loads: Floats, heavy: int, lightest: tuple[int, int], capacity: int, members: Ints, totals: Doubles
) -> tuple[float, float, int, int]:
    """(score, gap, i, j) of the best single swap between the corners of two packs; ties: first in nesting order."""
    best, best_gap, best_i, best_j = np.inf, 0.0, NONE, NONE
    for light in lightest:
        if light == NONE:
            continue
        gap = totals[heavy] - totals[light]
        if gap <= CLOSE:
            continue
        for i in heaviest_two_items(loads, heavy, capacity, members):
            for j in lightest_two_items(loads, light, capacity, members):
                score = _score(gap, loads[i], loads[j])
                if score < best:
                    best, best_gap, best_i, best_j = score, gap, i, j
    return best, best_gap, best_i, best_j


@stage
def refine_corner(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, work: Ints, totals: Doubles
) -> None:
    """Swap up to `steps` times (one more where a first swap of a single step leaves the packs uneven) one of the
    two heaviest items of the heaviest pack with one of the two lightest of a light pack, or both with both."""
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, totals)
    allowed = steps
    step = 0
    while step < allowed:
        heavy = heaviest_pack(totals, num_packs)
        lightest = lightest_two_packs(totals, num_packs, heavy)
        score, gap, i, j = _corner_pair(loads, heavy, lightest, capacity, members, totals)
        if score < gap - CLOSE:
            swap_items(i, j, loads, pack, slot, capacity, members, totals)
            if step == 0 and steps == 1 and imbalance(totals, num_packs) > 0.03:
                allowed = 2
            if step == 0 and steps >= 2 and score <= 0.8 * gap:
                return
        else:
            i1, i2 = heaviest_two_items(loads, heavy, capacity, members)
            j1, j2 = lightest_two_items(loads, lightest[0], capacity, members)
            gap = totals[heavy] - totals[lightest[0]]
            moved = np.float64(loads[i1]) + np.float64(loads[i2]) - np.float64(loads[j1]) - np.float64(loads[j2])
            if not abs(gap - 2.0 * moved) < gap - CLOSE:
                return
            swap_items(i1, j1, loads, pack, slot, capacity, members, totals)
            swap_items(i2, j2, loads, pack, slot, capacity, members, totals)
        step += 1


@stage
def corner_gpu_steps(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, work: Ints, totals: Doubles
) -> int:
    """The steps of `refine_corner` at the GPU stage: one more where the packing left the GPUs uneven."""
    load_packs(loads, pack, slot, num_packs, work[: loads.size], totals)
    return steps + 1 if imbalance(totals, num_packs) > 0.02 else steps


@stage
def _heaviest_two_packs(totals: Doubles, num_packs: int) -> tuple[int, int]:
    """The last two packs of the stable ascending order of loads, last first: on ties the higher index."""
    first, second = NONE, NONE
    for q in range(num_packs):
        if first == NONE or totals[q] >= totals[first]:
            first, second = q, first
        elif second == NONE or totals[q] >= totals[second]:
            second = q
    return first, second


@stage
def _extremes_but(totals: Doubles, num_packs: int, donor: int, receiver: int) -> tuple[float, float]:
    """The largest and smallest load of the packs other than two."""
    largest, smallest = -np.inf, np.inf
    for q in range(num_packs):
        if q not in (donor, receiver):
            largest = max(largest, totals[q])
            smallest = min(smallest, totals[q])
    return largest, smallest


@stage
def _holds(q: int, label: int, labels: Ints, capacity: int, members: Ints) -> bool:
    """Whether pack q has a replica of the expert `label`."""
    found = False
    for at in range(q * capacity, (q + 1) * capacity):
        found = found or labels[members[at]] == label
    return found


@stage
def _peak_candidate(
    donor: int,
    receiver: int,
    best: tuple[float, float, int, int, int],
    loads: Floats,
    labels: Ints,
    num_packs: int,
    capacity: int,
    members: Ints,
    totals: Doubles,
) -> tuple[float, float, int, int, int]:
    """`best` = (largest pack load after, largest - smallest after, duplicates made, i, j), or the swap between
    donor and receiver that has smaller first three."""
    largest_other, smallest_other = _extremes_but(totals, num_packs, donor, receiver)
    for i in heaviest_two_items(loads, donor, capacity, members):
        for j in lightest_two_items(loads, receiver, capacity, members):
            weight_i, weight_j = np.float64(loads[i]), np.float64(loads[j])
            new_donor = (totals[donor] - weight_i) + weight_j
            new_receiver = (totals[receiver] - weight_j) + weight_i
            largest = max(largest_other, new_donor, new_receiver)
            spread = largest - min(smallest_other, new_donor, new_receiver)
            penalty = int(_holds(donor, labels[j], labels, capacity, members))
            penalty += int(_holds(receiver, labels[i], labels, capacity, members))
            if (largest, spread, penalty) < (best[0], best[1], best[2]):
                best = (largest, spread, penalty, i, j)
    return best


@stage
def refine_peak(
    loads: Floats, labels: Ints, pack: Ints, slot: Ints, num_packs: int, work: Ints, totals: Doubles
) -> None:
    """Make the one swap between the two heaviest packs and the three lightest that leaves the smallest largest
    load, then the smallest spread, then the fewest experts twice on a pack, if it makes one of the loads better.

    labels [items] is the expert of each item. Two packs never swap: both are heaviest.
    """
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, totals)
    donors = _heaviest_two_packs(totals, num_packs)
    best = (np.inf, np.inf, NONE, NONE, NONE)
    for donor in donors:
        receiver = NONE
        for _ in range(3):
            receiver = next_lightest_pack(totals, num_packs, receiver)
            if receiver in donors:
                break
            if totals[donor] > totals[receiver]:
                best = _peak_candidate(donor, receiver, best, loads, labels, num_packs, capacity, members, totals)
    new_largest, new_spread, _, i, j = best
    if i == NONE:
        return
    largest = totals[donors[0]]
    spread = largest - totals[next_lightest_pack(totals, num_packs, NONE)]
    if new_largest + EPSILON < largest or (abs(new_largest - largest) <= EPSILON and new_spread + EPSILON < spread):
        swap_items(i, j, loads, pack, slot, capacity, members, totals)
