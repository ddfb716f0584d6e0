"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles, Ints, counting, doubles, ints
from eplb_triton.cpu.compiled import stage

DIGIT_BITS = 7  # of 28: 4 passes
DIGITS = 1 << DIGIT_BITS
NONE = np.int64(-1)


@stage
def fill_blocks(loads: Doubles, labels: Ints, num_packs: int, pack: Ints, slot: Ints) -> None:
    """Fill pack and slot of each item: the next `num_packs` heaviest at a time, the heaviest to the lightest pack.

    Items are taken by (load descending, label, index), packs by (load, number). Items that continue the last label of
    the block before go to the first packs that did not get it there. Loads are fixed point, equal within a label.
    """
    n, d = loads.size, num_packs
    order = _by_load_and_label(loads, labels)
    totals, packs, before = doubles(d), counting(d), ints(d)
    totals[:] = 0
    before[:] = NONE
    for start in range(0, n, d):
        _sort_ascending(packs, totals)
        continuing, last = 0, NONE
        if start > 0:
            last = labels[order[start - 1]]
            while continuing < d and labels[order[start + continuing]] == last:
                continuing += 1
        item = start
        for at in range(d):  # the packs that the continuing items go to
            if item < start + continuing and before[packs[at]] != last:
                _put(order[item], packs[at], start // d, loads, pack, slot, totals)
                item += 1
                packs[at] = ~packs[at]
        for at in range(d):
            if packs[at] < 0:
                packs[at] = ~packs[at]
            else:
                _put(order[item], packs[at], start // d, loads, pack, slot, totals)
                item += 1
        for k in range(start, start + d):
            before[pack[order[k]]] = labels[order[k]]


@stage
def _put(item: int, q: int, place: int, loads: Doubles, pack: Ints, slot: Ints, totals: Doubles) -> None:
    pack[item] = q
    slot[item] = place
    totals[q] += loads[item]


@stage
def _sort_ascending(packs: Ints, totals: Doubles) -> None:
    """By (load, number); insertion: the packs are few, and in order or reversed in most of the blocks."""
    for k in range(1, packs.size):
        q = packs[k]
        at = k
        while at > 0 and (
            totals[packs[at - 1]] > totals[q] or (totals[packs[at - 1]] == totals[q] and packs[at - 1] > q)
        ):
            packs[at] = packs[at - 1]
            at -= 1
        packs[at] = q


@stage
def _by_load_and_label(loads: Doubles, labels: Ints) -> Ints:
    """The items by (load descending, label, index): a counting sort by label, then a radix sort by load."""
    n = loads.size
    order, other = ints(n), ints(n)
    places = ints(max(n, DIGITS) + 1)
    places[:] = 0
    for i in range(n):
        places[labels[i] + 1] += 1
    for label in range(n):
        places[label + 1] += places[label]
    for i in range(n):
        order[places[labels[i]]] = i
        places[labels[i]] += 1
    for digit in range(4):
        places[:] = 0
        for i in range(n):
            places[_digit(loads[i], digit) + 1] += 1
        for value in range(DIGITS):
            places[value + 1] += places[value]
        for k in range(n):
            value = _digit(loads[order[k]], digit)
            other[places[value]] = order[k]
            places[value] += 1
        order, other = other, order
    return order


@stage
def _digit(load: float, digit: int) -> int:
    """A digit of the load, complemented: the heaviest first."""
    value: int = DIGITS - 1 - ((np.int64(load) >> (DIGIT_BITS * digit)) & (DIGITS - 1))
    return value
