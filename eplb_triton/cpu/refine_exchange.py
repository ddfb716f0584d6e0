"""Exchange: items between heavy and light packs, until the heaviest is at its target or no exchange lightens it.

Loads are fixed point (fixed.py). Every `refine_*` changes pack and slot in place. An exchange never brings a label to a
pack that holds it. Its value is the larger of the two pack loads after it, and has to be below the heavier of the two
before. In a round packs stand by (load descending, number): position 0 is the heaviest.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles, Ints, double_rows, doubles, flags, int_rows
from eplb_triton.cpu.compiled import inlined, stage
from eplb_triton.cpu.fixed import PENALTY
from eplb_triton.cpu.positions import State, exchange_items, holds_label, new_state, stand_packs

PACKS_PER_PROPOSER = 8
NONE = np.int64(-1)
HEAVIEST = np.int64(0)  # its position; an int64, as in tournament.py
PAIR = np.int64(2)
NOTHING = 4 * PENALTY  # above every value


@stage
def _penalties(state: State, heavy: int, stays: Doubles, comes: Doubles) -> None:
    """For item i of the pack at `heavy` and item j of that at l: what stays there without i, stays[i, l], and what
    comes with j, comes[j, l]; too heavy where it must not be."""
    capacity, m = state.items.shape
    for k in range(capacity):
        left = state.heights[heavy] - state.gives[k, heavy]
        stays_k, comes_k, gives_k = stays[k], comes[k], state.gives[k]
        for light in range(m):
            stays_k[light] = left
            comes_k[light] = gives_k[light]
    for k in range(capacity):
        label = state.labels[k, heavy]
        if state.shared[label]:
            for other in range(capacity):
                labels = state.labels[other]
                for light in range(m):
                    if labels[light] == label:
                        stays[k, light] += PENALTY
                        comes[other, light] += PENALTY


@stage
def _best_values(state: State, heavy: int, stays: Doubles, comes: Doubles, least: Doubles) -> None:
    """Fill least[l]: value of the best exchange of the pack at `heavy` with the one at l."""
    capacity, m = state.items.shape
    _penalties(state, heavy, stays, comes)
    least[:] = NOTHING
    for i in range(capacity):
        gives, stays_i = state.gives[i, heavy], stays[i]
        for j in range(capacity):
            comes_j, left_j = comes[j], state.left[j]
            # along the packs: contiguous, from 0 and without a branch, so that it fills a vector
            for light in range(m):
                heavy_load, light_load = stays_i[light] + comes_j[light], left_j[light] + gives
                worse = heavy_load if heavy_load > light_load else light_load
                least[light] = worse if worse < least[light] else least[light]


@inlined
def _best_items(state: State, heavy: int, light: int) -> tuple[float, int, int]:
    """Value and items of the best exchange of two packs; NONE where all are banned. ties: lowest slots"""
    capacity = state.items.shape[0]
    value, best_i, best_j = NOTHING, NONE, NONE
    for i in range(capacity):
        if holds_label(state, light, state.labels[i, heavy]):
            continue
        left, gives = state.left[i, heavy], state.gives[i, heavy]
        for j in range(capacity):
            worse = max(left + state.gives[j, light], state.left[j, light] + gives)
            if worse < value and not holds_label(state, heavy, state.labels[j, light]):
                value, best_i, best_j = worse, state.items[i, heavy], state.items[j, light]
    return value, best_i, best_j


@stage
def refine_pairs(
    loads: Doubles, labels: Ints, pack: Ints, slot: Ints, num_packs: int, target: float, rounds: int
) -> None:
    """Up to `rounds` times, position q of the heavier half makes its best exchange with m - 1 - ((q + r) mod m // 2).

    Ties: the lowest slot of the heavier pack, then of the lighter one.
    """
    half = num_packs // 2
    if half == 0 or loads.size == num_packs:
        return
    state = new_state(loads, labels, pack, slot, num_packs)
    for r in range(rounds):
        stand_packs(state, loads, labels)
        if state.heights[0] <= target:
            return
        for q in range(half):
            value, i, j = _best_items(state, q, num_packs - 1 - (q + r) % half)
            if value < state.heights[q]:
                exchange_items(state, loads, pack, slot, i, j)


@stage
def refine_match(
    loads: Doubles,
    labels: Ints,
    pack: Ints,
    slot: Ints,
    num_packs: int,
    target: float,
    rounds: int,
    proposers: int,
) -> None:
    """Up to `rounds` times, each of the heaviest packs above `target` proposes its best exchange with any behind it.

    The heaviest go first, and no pack takes part in two; nothing is done if the heaviest has no proposal. There are
    `proposers` of them, or an eighth of all packs if that is more, but at most half.

    Ties: the heavier partner, then the lowest slot of the proposer, then of the partner.
    """
    proposers = min(max(proposers, num_packs // PACKS_PER_PROPOSER), num_packs // 2)
    if proposers == 0 or loads.size == num_packs:
        return
    capacity = loads.size // num_packs
    state = new_state(loads, labels, pack, slot, num_packs)
    stays, comes = double_rows(capacity, num_packs), double_rows(capacity, num_packs)
    least, taken = doubles(num_packs), flags(num_packs)
    for _ in range(rounds):
        stand_packs(state, loads, labels)
        if state.heights[0] <= target:
            return
        taken[:] = False
        for q in range(proposers):
            if state.heights[q] <= target:
                break
            if taken[q]:  # as the partner of a heavier one
                continue
            _best_values(state, q, stays, comes, least)
            partner = q + 1
            for light in range(q + 2, num_packs):
                if least[light] < least[partner]:
                    partner = light
            if least[partner] >= state.heights[q]:
                if q == 0:
                    return
                continue
            if not taken[partner]:
                _, i, j = _best_items(state, q, partner)
                exchange_items(state, loads, pack, slot, i, j)
                taken[q] = True
                taken[partner] = True


@stage
def refine_doubles(
    loads: Doubles,
    labels: Ints,
    pack: Ints,
    slot: Ints,
    num_packs: int,
    target: float,
    steps: int,
    candidates: int,
) -> None:
    """Up to `steps` times, the best exchange of two items of the heaviest pack for two of one of the lightest, of which
    as many are met as `candidates` pairs of pairs allow.

    Ties: the heavier partner, then the lowest slots of the heaviest pack, then of the partner (two: lexicographic).
    """
    capacity = loads.size // num_packs
    num_pairs = capacity * (capacity - 1) // 2
    if num_packs == 1 or num_pairs == 0 or candidates < num_pairs * num_pairs:
        return
    partners = min(num_packs - 1, candidates // (num_pairs * num_pairs))
    state = new_state(loads, labels, pack, slot, num_packs)
    heavy_pairs, light_pairs = int_rows(num_pairs, PAIR), int_rows(num_pairs, PAIR)
    heavy_gives, light_gives = doubles(num_pairs), doubles(num_pairs)
    best = (NONE, NONE, NONE, NONE)
    for _ in range(steps):
        stand_packs(state, loads, labels)
        if state.heights[0] <= target:
            return
        value = state.heights[0]
        for light in range(num_packs - partners, num_packs):
            heavies = _free_pairs(state, HEAVIEST, light, heavy_pairs, heavy_gives)
            lights = _free_pairs(state, light, HEAVIEST, light_pairs, light_gives)
            for i in range(heavies):
                left, gives = state.heights[0] - heavy_gives[i], heavy_gives[i]
                least = NOTHING
                for j in range(lights):
                    worse = max(left + light_gives[j], (state.heights[light] - light_gives[j]) + gives)
                    least = min(least, worse)
                if least < value:
                    value = least
                    for j in range(lights):
                        if max(left + light_gives[j], (state.heights[light] - light_gives[j]) + gives) == least:
                            best = (heavy_pairs[i, 0], heavy_pairs[i, 1], light_pairs[j, 0], light_pairs[j, 1])
                            break
        if value >= state.heights[0]:
            return
        exchange_items(state, loads, pack, slot, best[0], best[2])
        exchange_items(state, loads, pack, slot, best[1], best[3])


@stage
def _free_pairs(state: State, at: int, other: int, pairs: Ints, gives: Doubles) -> int:
    """List the pairs of items of the pack at `at` whose labels the one at `other` does not hold; how many."""
    capacity, found = state.items.shape[0], 0
    for first in range(capacity):
        if holds_label(state, other, state.labels[first, at]):
            continue
        for second in range(first + 1, capacity):
            if not holds_label(state, other, state.labels[second, at]):
                pairs[found, 0] = state.items[first, at]
                pairs[found, 1] = state.items[second, at]
                gives[found] = state.gives[first, at] + state.gives[second, at]
                found += 1
    return found
