"""Refine: swap items between the heaviest packs and the lightest after packing.

loads [n] float32 of the items; pack and slot [n] int64 of each item, changed; work (see new_work) and
pack_loads [num_packs] float64, the pack loads, are scratch.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.constants import EPSILON, GOOD_SWAP, LEVEL, UNBALANCED_AFTER_STEP, UNBALANCED_AT_START
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


@stage
def _score(difference: float, load_i: np.float32, load_j: np.float32) -> float:
    """The difference between two packs after swapping an item of the heavy one with one of the light one."""
    moved: float = np.float64(load_i) - np.float64(load_j)
    return abs(difference - 2.0 * moved)


@stage
def _nearest_pair(
    loads: Floats, heavy: int, light: int, difference: float, capacity: int, members: Ints
) -> tuple[float, int, int]:
    """The smallest score over all pairs of items of two packs, and its pair; ties: lowest i, then lowest j."""
    best, best_i, best_j = np.inf, NONE, NONE
    for at_i in range(heavy * capacity, (heavy + 1) * capacity):
        i = members[at_i]
        for at_j in range(light * capacity, (light + 1) * capacity):
            j = members[at_j]
            score = _score(difference, loads[i], loads[j])
            if score < best or (score == best and (i < best_i or (i == best_i and j < best_j))):
                best, best_i, best_j = score, i, j
    return best, best_i, best_j


@stage
def refine_nearest(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, lights: int, work: Ints, pack_loads: Doubles
) -> None:
    """Swap up to `steps` times the pair that best levels the heaviest pack with one of the `lights` lightest."""
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, pack_loads)
    for _ in range(steps):
        heavy = heaviest_pack(pack_loads, num_packs)
        lightest = lightest_two_packs(pack_loads, num_packs, NONE)
        best, best_difference, best_i, best_j = np.inf, 0.0, NONE, NONE
        for nth in range(lights):
            difference = pack_loads[heavy] - pack_loads[lightest[nth]]
            if lightest[nth] == heavy or difference <= LEVEL:
                continue
            score, i, j = _nearest_pair(loads, heavy, lightest[nth], difference, capacity, members)
            if score < best:
                best, best_difference, best_i, best_j = score, difference, i, j
        if not best < best_difference - LEVEL:
            return
        swap_items(best_i, best_j, loads, pack, slot, capacity, members, pack_loads)


@stage
def _corner_pair(
    loads: Floats, heavy: int, lightest: tuple[int, int], capacity: int, members: Ints, pack_loads: Doubles
) -> tuple[float, float, int, int]:
    """(score, difference, i, j) of the best swap between the corners of two packs; ties: first in nesting order."""
    best, best_difference, best_i, best_j = np.inf, 0.0, NONE, NONE
    for light in lightest:
        if light == NONE:
            continue
        difference = pack_loads[heavy] - pack_loads[light]
        if difference <= LEVEL:
            continue
        for i in heaviest_two_items(loads, heavy, capacity, members):
            for j in lightest_two_items(loads, light, capacity, members):
                score = _score(difference, loads[i], loads[j])
                if score < best:
                    best, best_difference, best_i, best_j = score, difference, i, j
    return best, best_difference, best_i, best_j


@stage
def refine_corner(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, work: Ints, pack_loads: Doubles
) -> None:
    """Swap up to `steps` times (one more where a first swap of a single step leaves the packs uneven) one of the
    two heaviest items of the heaviest pack with one of the two lightest of a light pack, or both with both."""
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, pack_loads)
    allowed = steps
    step = 0
    while step < allowed:
        heavy = heaviest_pack(pack_loads, num_packs)
        lightest = lightest_two_packs(pack_loads, num_packs, heavy)
        score, difference, i, j = _corner_pair(loads, heavy, lightest, capacity, members, pack_loads)
        if score < difference - LEVEL:
            swap_items(i, j, loads, pack, slot, capacity, members, pack_loads)
            if step == 0 and steps == 1 and imbalance(pack_loads, num_packs) > UNBALANCED_AFTER_STEP:
                allowed = 2
            if step == 0 and steps >= 2 and score <= GOOD_SWAP * difference:
                return
        else:
            i1, i2 = heaviest_two_items(loads, heavy, capacity, members)
            j1, j2 = lightest_two_items(loads, lightest[0], capacity, members)
            difference = pack_loads[heavy] - pack_loads[lightest[0]]
            moved = np.float64(loads[i1]) + np.float64(loads[i2]) - np.float64(loads[j1]) - np.float64(loads[j2])
            if not abs(difference - 2.0 * moved) < difference - LEVEL:
                return
            swap_items(i1, j1, loads, pack, slot, capacity, members, pack_loads)
            swap_items(i2, j2, loads, pack, slot, capacity, members, pack_loads)
        step += 1


@stage
def corner_gpu_steps(
    loads: Floats, pack: Ints, slot: Ints, num_packs: int, steps: int, work: Ints, pack_loads: Doubles
) -> int:
    """The steps of `refine_corner` at the GPU stage: one more where the packing left the GPUs uneven."""
    load_packs(loads, pack, slot, num_packs, work[: loads.size], pack_loads)
    return steps + 1 if imbalance(pack_loads, num_packs) > UNBALANCED_AT_START else steps


@stage
def _heaviest_two_packs(pack_loads: Doubles, num_packs: int) -> tuple[int, int]:
    """The last two packs of the stable ascending order of loads, last first: on ties the higher index."""
    first, second = NONE, NONE
    for q in range(num_packs):
        if first == NONE or pack_loads[q] >= pack_loads[first]:
            first, second = q, first
        elif second == NONE or pack_loads[q] >= pack_loads[second]:
            second = q
    return first, second


@stage
def _extremes_but(pack_loads: Doubles, num_packs: int, donor: int, receiver: int) -> tuple[float, float]:
    """The largest and smallest load of the packs other than two."""
    largest, smallest = -np.inf, np.inf
    for q in range(num_packs):
        if q not in (donor, receiver):
            largest = max(largest, pack_loads[q])
            smallest = min(smallest, pack_loads[q])
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
    pack_loads: Doubles,
) -> tuple[float, float, int, int, int]:
    """`best` = (largest pack load after, largest - smallest after, duplicates made, i, j), or the swap between
    donor and receiver that has smaller first three."""
    largest_other, smallest_other = _extremes_but(pack_loads, num_packs, donor, receiver)
    for i in heaviest_two_items(loads, donor, capacity, members):
        for j in lightest_two_items(loads, receiver, capacity, members):
            load_i, load_j = np.float64(loads[i]), np.float64(loads[j])
            new_donor = (pack_loads[donor] - load_i) + load_j
            new_receiver = (pack_loads[receiver] - load_j) + load_i
            largest = max(largest_other, new_donor, new_receiver)
            spread = largest - min(smallest_other, new_donor, new_receiver)
            penalty = int(_holds(donor, labels[j], labels, capacity, members))
            penalty += int(_holds(receiver, labels[i], labels, capacity, members))
            if (largest, spread, penalty) < (best[0], best[1], best[2]):
                best = (largest, spread, penalty, i, j)
    return best


@stage
def refine_peak(
    loads: Floats, labels: Ints, pack: Ints, slot: Ints, num_packs: int, work: Ints, pack_loads: Doubles
) -> None:
    """Make the one swap between the two heaviest packs and the three lightest that leaves the smallest largest
    load, then the smallest spread, then the fewest experts twice on a pack, if it makes one of the loads better.

    labels [items] is the expert of each item. Two packs never swap: both are heaviest.
    """
    if 1 in (num_packs, loads.size // num_packs):
        return
    members = work[: loads.size]
    capacity = load_packs(loads, pack, slot, num_packs, members, pack_loads)
    donors = _heaviest_two_packs(pack_loads, num_packs)
    best = (np.inf, np.inf, NONE, NONE, NONE)
    for donor in donors:
        receiver = NONE
        for _ in range(3):
            receiver = next_lightest_pack(pack_loads, num_packs, receiver)
            if receiver in donors:
                break
            if pack_loads[donor] > pack_loads[receiver]:
                best = _peak_candidate(donor, receiver, best, loads, labels, num_packs, capacity, members, pack_loads)
    new_largest, new_spread, _, i, j = best
    if i == NONE:
        return
    largest = pack_loads[donors[0]]
    spread = largest - pack_loads[next_lightest_pack(pack_loads, num_packs, NONE)]
    if new_largest + EPSILON < largest or (abs(new_largest - largest) <= EPSILON and new_spread + EPSILON < spread):
        swap_items(i, j, loads, pack, slot, capacity, members, pack_loads)
