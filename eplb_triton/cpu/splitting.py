"""Splitting: how many of an expert's tokens each of its replicas gets, one layer at a time.

A *place* of an expert is a slot of it on a GPU that holds no lower slot of it. State of a layer:
    first    [E + 1] int64, where the places of each expert begin in `places`
    places   [P] int64, the places of all experts, each expert's ascending
"""

from __future__ import annotations

import math

import numpy as np

from eplb_triton.cpu.arith import Floats, Ints, ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.places import Int32s, Slots, list_places

TOTAL_BITS = np.int64(23)  # of float loads in fixed point: E of them stay below 2**24
WORD = 62  # classes in a word of a mask


@stage
def place_classes(phy2log: Slots, num_gpus: int, classes: Int32s) -> None:
    """Fill `classes` [E] of one layer: experts of at least two places, in index order, take the lowest class none of
    whose experts uses one of their GPUs; the others -1."""
    num_experts, size = classes.size, phy2log.size // num_gpus
    first, places = ints(num_experts + 1), ints(phy2log.size)
    list_places(phy2log, num_gpus, first, places)
    masks = np.zeros((num_experts // WORD + 1, num_gpus), np.int64)  # bit: a class that uses the GPU
    for expert in range(num_experts):
        own = places[first[expert] : first[expert + 1]]
        classes[expert] = -1
        if own.size > 1:
            word, full = -1, (1 << WORD) - 1
            used = full
            while used == full:
                word += 1
                used = 0
                for slot in own:
                    used |= masks[word, slot // size]
            bit = 0
            while used >> bit & 1:
                bit += 1
            for slot in own:
                masks[word, slot // size] |= np.int64(1) << bit
            classes[expert] = word * WORD + bit


@stage
def whole_counts(loads: Floats, counts: Ints) -> int:
    """Fill `counts` with trunc(load * 2^scale), which add up to less than 2^24; the scale, 0 for an idle layer."""
    largest = np.float64(0)
    for i in range(loads.size):
        largest = max(largest, np.float64(loads[i]))
    if largest == 0:
        counts[:] = 0
        return 0
    bits = 0
    while loads.size > 1 << bits:
        bits += 1
    scale: int = TOTAL_BITS - bits - (np.int64(math.frexp(largest)[1]) - 1)
    factor = math.ldexp(1.0, scale)
    for i in range(loads.size):
        counts[i] = np.int64(np.float64(loads[i]) * factor)
    return scale


@stage
def split_counts(phy2log: Slots, classes: Int32s, counts: Ints, num_gpus: int, rounds: int, quotas: Int32s) -> None:
    """Fill `quotas` [P] of one layer: `counts` [E] split evenly over the places of each expert, then levelled by
    `rounds`, class after class. Ties: lowest slot."""
    num_experts, size = counts.size, phy2log.size // num_gpus
    first, places = ints(num_experts + 1), ints(phy2log.size)
    list_places(phy2log, num_gpus, first, places)
    load = np.zeros(num_gpus, np.int64)
    quotas[:] = 0
    for expert in range(num_experts):
        own = places[first[expert] : first[expert + 1]]
        if own.size > 0:
            each, rest = divmod(counts[expert], own.size)
            for i in range(own.size):
                quotas[own[i]] = each + (i < rest)
                load[own[i] // size] += quotas[own[i]]
    order = _by_class(classes)
    others, slots = ints(num_gpus), ints(num_gpus)
    for _ in range(rounds):
        changed = False
        for expert in order:  # of one class: in any order, for they share no GPU
            own = places[first[expert] : first[expert + 1]]
            if counts[expert] > 0:
                changed |= _level(own, counts[expert], size, load, quotas, others, slots)
        if not changed:
            break


@stage
def _by_class(classes: Int32s) -> Ints:
    """The experts that have a class, by class, then index."""
    ends = np.zeros(max(0, classes.max()) + 2, np.int64)
    for expert in range(classes.size):
        ends[classes[expert] + 1] += 1
    total = np.int64(0)
    for number in range(1, ends.size):
        ends[number], total = total, total + ends[number]
    order = ints(total)
    for expert in range(classes.size):
        number = classes[expert] + 1
        if number > 0:
            order[ends[number]] = expert
            ends[number] += 1
    return order


@stage
def _level(own: Ints, w: int, size: int, load: Ints, quotas: Int32s, others: Ints, slots: Ints) -> bool:
    """Pour `w` tokens anew onto the places `own`, to one level; whether a quota changed."""
    for i in range(own.size):  # by other load, ties lowest slot: insertion, for places are few
        other, at = load[own[i] // size] - quotas[own[i]], i
        while at > 0 and others[at - 1] > other:
            others[at], slots[at] = others[at - 1], slots[at - 1]
            at -= 1
        others[at], slots[at] = other, own[i]
    m, total = 1, w + others[0]
    while m < own.size and total > m * others[m]:
        total += others[m]
        m += 1
    level, rest = divmod(total, m)
    changed = False
    for i in range(own.size):
        share = level - others[i] + (i < rest) if i < m else 0
        changed |= share != quotas[slots[i]]
        load[slots[i] // size] = others[i] + share
        quotas[slots[i]] = share
    return changed
