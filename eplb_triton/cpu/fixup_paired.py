"""Fix-up where GPUs have two slots: moves of single replicas, judged on the largest pair of the best pairing."""

from __future__ import annotations

import numpy as np

from eplb_triton import constants
from eplb_triton.cpu.arith import Flags, Floats, Ints, descending_order, divide, flags, floats, ints
from eplb_triton.cpu.compiled import stage

PAIR_GAIN = np.float32(constants.PAIR_GAIN)
INFINITE = np.float32(np.inf)


@stage
def move_paired(loads: Floats, counts: Ints, num_packs: int, moves: int, donors: int, work: Ints) -> None:
    """For packs of two: up to `moves` times, move a replica where that most lowers the largest pair of the best
    pairing, from one of the `donors` experts of smallest w / (c - 1) to one of the largest pair.

    Ties: the first largest pair; the donor of smaller w / (c - 1), then the lower; the heavier receiver.
    """
    e = loads.size
    replica_loads, expert = floats(2 * num_packs), ints(2 * num_packs)
    tried = flags(e)
    for _ in range(moves):
        value, heavy, light = _largest_pair(loads, counts, num_packs, replica_loads, expert, work)
        best, best_donor, best_receiver = INFINITE, 0, 0
        tried[:] = False
        for _ in range(min(donors, e)):
            donor = _next_donor(loads, counts, tried)
            if donor < 0:
                break
            tried[donor] = True
            for receiver in (heavy, light):
                if receiver == donor or counts[receiver] >= num_packs:
                    continue
                counts[donor] -= 1
                counts[receiver] += 1
                after = _largest_pair(loads, counts, num_packs, replica_loads, expert, work)[0]
                counts[donor] += 1
                counts[receiver] -= 1
                if after < best:
                    best, best_donor, best_receiver = after, donor, receiver
        if not best + PAIR_GAIN * value < value:
            return
        counts[best_donor] -= 1
        counts[best_receiver] += 1


@stage
def _next_donor(loads: Floats, counts: Ints, tried: Flags) -> int:
    """The expert of smallest w / (c - 1) with two replicas or more that was not tried; -1: none. ties: lowest"""
    found, least = -1, INFINITE
    for i in range(loads.size):
        if counts[i] > 1 and not tried[i]:
            replica_load = divide(loads[i], counts[i] - 1)
            if found < 0 or replica_load < least:
                found, least = i, replica_load
    return found


@stage
def _largest_pair(
    loads: Floats, counts: Ints, num_packs: int, replica_loads: Floats, expert: Ints, work: Ints
) -> tuple[np.float32, int, int]:
    """The largest of the pairs of the best pairing and its two experts, the heavier first; ties: the first pair."""
    k = 0
    for i in range(counts.size):
        replica_load = divide(loads[i], counts[i])
        for _ in range(counts[i]):
            replica_loads[k] = replica_load
            expert[k] = i
            k += 1
    order = descending_order(replica_loads, work)
    first, largest = 0, np.float32(-1)
    for q in range(num_packs):
        pair = replica_loads[order[q]] + replica_loads[order[2 * num_packs - 1 - q]]
        if pair > largest:
            first, largest = q, pair
    heavy: int = expert[order[first]]
    light: int = expert[order[2 * num_packs - 1 - first]]
    return largest, heavy, light
