"""Waterfill: replica counts from one level that every replica load is brought under, the last few picked singly.

loads [e] float32, counts [e] int64 and the replica list (expert, rank) [p] int64 of one row, all but loads filled
in place; trees [3, blocks, BRANCHES] int64 is scratch. A replica load is w / c.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.constants import BISECTIONS
from eplb_triton.cpu.arith import Floats, Ints, divide
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.tournament import (
    DHONDT,
    NEXT_DHONDT,
    NEXT_SAINTE_LAGUE,
    NO_KEY,
    fill_quotients,
    key_expert,
    largest_two,
    refresh_quotient,
    replace_leaf,
)


@stage
def waterfill_counts(loads: Floats, num_replicas: int, counts: Ints, trees: Ints) -> None:
    """Fill `counts` with the replicas of each expert; they sum to `num_replicas`."""
    e, p = loads.size, num_replicas
    counts[:] = 1
    if p == e:
        return
    heaviest = np.float32(0)
    for i in range(e):
        heaviest = max(heaviest, loads[i])
    if heaviest == 0:
        for i in range(e):
            counts[i] = p // e + (1 if i < p % e else 0)
        return
    level = _water_level(loads, p, max(np.float64(heaviest), 1.0))
    extras = p
    for i in range(e):
        counts[i] = max(1, np.int64(np.ceil(loads[i] / level)))
        extras -= counts[i]
    if extras <= 0:
        return
    tail = min(max(1, np.int64(np.rint(0.1 * (p - e)))), extras)
    _add_in_bulk(loads, counts, extras - tail, trees[0])
    _add_singly(loads, counts, tail, trees)


@stage
def _water_level(loads: Floats, num_replicas: int, highest: float) -> np.float32:
    """The lowest of the bisected levels at which no more than `num_replicas` replicas are needed."""
    low, high = 0.0, highest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        if _replicas_needed(loads, np.float32(middle), num_replicas) <= num_replicas:
            high = middle
        else:
            low = middle
    level: np.float32 = np.float32(high)
    return level


@stage
def _replicas_needed(loads: Floats, level: np.float32, num_replicas: int) -> int:
    """The replicas that bring every replica load under `level`, or some number above `num_replicas` if they are more.

    One expert alone can need 2^40; cut at num_replicas + 1, a count fits an int32, which vectorises, and the
    sum is above num_replicas exactly when it was.
    """
    cut = np.float32(num_replicas + 1)
    needed = 0
    for i in range(loads.size):
        needed += max(np.int32(1), np.int32(min(np.ceil(loads[i] / level), cut)))
    return needed


@stage
def _add_in_bulk(loads: Floats, counts: Ints, bulk: int, tree: Ints) -> None:
    """Add `bulk` replicas in rounds, in each one to each of the experts of largest replica load; ties: lowest."""
    e = loads.size
    while bulk > 0:
        top = fill_quotients(loads, counts, DHONDT, tree)
        for _ in range(min(bulk, e)):
            choice = key_expert(top)
            counts[choice] += 1
            top = replace_leaf(tree, e, choice, NO_KEY)
        bulk -= min(bulk, e)


@stage
def _add_singly(loads: Floats, counts: Ints, tail: int, trees: Ints) -> None:
    """Add `tail` replicas, each where it leaves the smaller largest replica load: at the largest w / (c + 1) or, if
    strictly better, at the largest w / (2c + 1)."""
    e = loads.size
    if e == 1:
        counts[0] += tail
        return
    top = fill_quotients(loads, counts, DHONDT, trees[0])
    top_d = fill_quotients(loads, counts, NEXT_DHONDT, trees[1])
    top_s = fill_quotients(loads, counts, NEXT_SAINTE_LAGUE, trees[2])
    for _ in range(tail):
        heaviest, dhondt, sainte_lague = key_expert(top), key_expert(top_d), key_expert(top_s)
        largest, second = largest_two(top, trees[0], e)
        others_d = second if dhondt == heaviest else largest
        others_s = second if sainte_lague == heaviest else largest
        peak_d = max(others_d, divide(loads[dhondt], counts[dhondt] + 1))
        peak_s = max(others_s, divide(loads[sainte_lague], counts[sainte_lague] + 1))
        # the smallest (peak, others, -w) wins; D'Hondt on equal keys
        take_s = peak_s < peak_d or (
            peak_s == peak_d and (others_s < others_d or (others_s == others_d and loads[sainte_lague] > loads[dhondt]))
        )
        choice = sainte_lague if take_s else dhondt
        counts[choice] += 1
        top = refresh_quotient(loads, counts, DHONDT, trees[0], heaviest)
        if choice != heaviest:
            top = refresh_quotient(loads, counts, DHONDT, trees[0], choice)
        top_d = refresh_quotient(loads, counts, NEXT_DHONDT, trees[1], choice)
        top_s = refresh_quotient(loads, counts, NEXT_SAINTE_LAGUE, trees[2], choice)


@stage
def list_by_expert(counts: Ints, expert: Ints, rank: Ints) -> None:
    """Fill the replica list with expert 0's replicas in rank order, then expert 1's, and so on."""
    k = 0
    for i in range(counts.size):
        for nth in range(counts[i]):
            expert[k] = i
            rank[k] = nth
            k += 1
