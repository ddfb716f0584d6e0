"""The state of a refinement: what is in each pack and what it weighs, kept while items are swapped."""

from __future__ import annotations

import numpy as np

from eplb_triton.constants import EPSILON
from eplb_triton.cpu.arith import Doubles, Floats, Ints
from eplb_triton.cpu.compiled import stage

NONE = np.int64(-1)


@stage
def load_packs(loads: Floats, pack: Ints, slot: Ints, num_packs: int, members: Ints, pack_loads: Doubles) -> int:
    """Fill the item at each (pack, slot) and the pack loads, summed in slot order; the capacity."""
    capacity = loads.size // num_packs
    for i in range(loads.size):
        members[pack[i] * capacity + slot[i]] = i
    for q in range(num_packs):
        total = 0.0
        for k in range(q * capacity, (q + 1) * capacity):
            total += np.float64(loads[members[k]])
        pack_loads[q] = total
    return capacity


@stage
def swap_items(
    i: int, j: int, loads: Floats, pack: Ints, slot: Ints, capacity: int, members: Ints, pack_loads: Doubles
) -> None:
    """Exchange the (pack, slot) of items i and j and carry the loads of their packs."""
    of_i, of_j = pack[i], pack[j]
    weight_i, weight_j = np.float64(loads[i]), np.float64(loads[j])
    pack_loads[of_i] = (pack_loads[of_i] - weight_i) + weight_j
    pack_loads[of_j] = (pack_loads[of_j] - weight_j) + weight_i
    pack[i], pack[j] = of_j, of_i
    slot[i], slot[j] = slot[j], slot[i]
    members[pack[i] * capacity + slot[i]] = i
    members[pack[j] * capacity + slot[j]] = j


@stage
def heaviest_pack(pack_loads: Doubles, num_packs: int) -> int:
    """ties: lowest"""
    heaviest = 0
    for q in range(1, num_packs):
        if pack_loads[q] > pack_loads[heaviest]:
            heaviest = q
    return heaviest


@stage
def lightest_two_packs(pack_loads: Doubles, num_packs: int, left_out: int) -> tuple[int, int]:
    """The lightest pack and the second lightest, without the pack `left_out`; NONE where there is none.

    ties: lowest
    """
    first, second = NONE, NONE
    for q in range(num_packs):
        if q == left_out:
            continue
        if first == NONE or pack_loads[q] < pack_loads[first]:
            first, second = q, first
        elif second == NONE or pack_loads[q] < pack_loads[second]:
            second = q
    return first, second


@stage
def imbalance(pack_loads: Doubles, num_packs: int) -> float:
    """(max - min) / mean of the pack loads."""
    total = 0.0
    largest: float = pack_loads[0]
    smallest: float = pack_loads[0]
    for q in range(num_packs):
        total += pack_loads[q]
        largest = max(largest, pack_loads[q])
        smallest = min(smallest, pack_loads[q])
    return (largest - smallest) / max(total / num_packs, EPSILON)


@stage
def heaviest_two_items(loads: Floats, q: int, capacity: int, members: Ints) -> tuple[int, int]:
    """The two heaviest items of a pack; ties: lowest item."""
    first, second = NONE, NONE
    for at in range(q * capacity, (q + 1) * capacity):
        i = members[at]
        if first == NONE or loads[i] > loads[first] or (loads[i] == loads[first] and i < first):
            first, second = i, first
        elif second == NONE or loads[i] > loads[second] or (loads[i] == loads[second] and i < second):
            second = i
    return first, second


@stage
def lightest_two_items(loads: Floats, q: int, capacity: int, members: Ints) -> tuple[int, int]:
    """The two lightest items of a pack; ties: lowest item."""
    first, second = NONE, NONE
    for at in range(q * capacity, (q + 1) * capacity):
        i = members[at]
        if first == NONE or loads[i] < loads[first] or (loads[i] == loads[first] and i < first):
            first, second = i, first
        elif second == NONE or loads[i] < loads[second] or (loads[i] == loads[second] and i < second):
            second = i
    return first, second


@stage
def next_lightest_pack(pack_loads: Doubles, num_packs: int, previous: int) -> int:
    """The pack after `previous` in the stable ascending order of loads, the first after NONE, NONE after the last."""
    following: int = NONE
    for q in range(num_packs):
        if previous != NONE and (
            pack_loads[q] < pack_loads[previous] or (pack_loads[q] == pack_loads[previous] and q <= previous)
        ):
            continue
        if following == NONE or pack_loads[q] < pack_loads[following]:
            following = q
    return following
