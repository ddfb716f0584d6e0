"""Replanning: swaps of a slot of the heaviest GPU with one of another GPU on its node.

They are judged by inner products: those of the slots of the heaviest GPU with all slots of its node give what every
GPU carries afterwards. Gains are first found in float32, all at once, then exactly for those near the largest.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Floats
from eplb_triton.cpu.compiled import inlined, stage
from eplb_triton.cpu.replanning_potential import LANES, NO_SLOT, Potential, Rule, State, powers, scores
from eplb_triton.cpu.replanning_room import NO_MOVE, Move, Room
from eplb_triton.cpu.replanning_sums import exchanged
from eplb_triton.cpu.replanning_vectors import BANNED, UNIT, add_multiples, fill_gains, largest_of, raise_to

EPSILON = 2.0**-24  # of float32


@stage
def best_swap(state: State, rule: Rule, potential: Potential, floor: int, room: Room) -> Move:
    """The swap of largest gain a slot between the heaviest GPU and another of its node; gain 0: none above `floor`.

    No swap brings an expert to a GPU that holds it. Ties: the lowest partner, then the lowest slot of the heaviest
    GPU, then of the partner.
    """
    if not _may_pay(state, rule, potential, floor):
        return NO_MOVE
    s, d, h = rule.num_slots, rule.num_gpus, potential.heaviest
    node = h // d
    scale = np.float32(1.0 / max(potential.top, 1.0))
    _multiply(state, rule, h, scale, room)
    _fill_columns(state, rule, h, scale, room)
    room.best[:] = -BANNED
    for i in range(s):
        slot = h * s + i
        at, gains = state.position[slot], room.gains[i]
        _sum_by_gpu(room.products[i], d, room.given)
        gains[:] = room.columns[0]
        held = state.slots[state.phy2log[slot]]
        while held != NO_SLOT:
            if state.gpu[held] // d == node:
                o = state.gpu[held] - node * d
                for k in range(s):
                    gains[k * d + o] = -BANNED
            held = state.following[held]
        heavy, light = np.float32(state.rest_mean[at]) * scale, np.float32(state.mean[at]) * scale
        heavy_rest = np.float32(state.rest_twice[at]) * scale * scale
        light_spread = np.float32(2.0 * state.spread[at]) * scale * scale
        own = heavy, light, heavy_rest, light_spread
        fill_gains(own, np.float32(rule.z), rule.norm, room.columns, room.given, room.products[i], gains, room.best)
    return _exact_best(state, rule, potential, floor, room)


@inlined
def _may_pay(state: State, rule: Rule, potential: Potential, floor: int) -> bool:
    """Whether a swap with some GPU of the node may gain more than `floor`.

    The two means add up to the same after any swap, and `gpu_least` bounds the deviations: so the two powers then are
    no less than twice that of half the sum.
    """
    h = potential.heaviest
    node = h // rule.num_gpus * rule.num_gpus
    margin = np.float64(4 * rule.norm + 8)
    for gpu in range(node, node + rule.num_gpus):
        if gpu == h:
            continue
        score = (state.gpu_mean[h] + state.gpu_mean[gpu] + state.gpu_least[h] + state.gpu_least[gpu]) * 0.5
        power = raise_to((score - 2.0 - rule.z) / max(potential.top, 1.0), rule.norm)  # scores are cut, twice
        least = 2.0 * power / UNIT - margin
        if np.float64(state.power[h] + state.power[gpu]) - least > 2.0 * np.float64(floor):
            return True
    return False


@inlined
def _multiply(state: State, rule: Rule, h: int, scale: np.float32, room: Room) -> None:
    """Fill the products: twice the covariances with the slots of GPU `h`, as the columns are scaled."""
    centred = state.centred[h // rule.num_gpus]
    per_step = np.float32(2.0) / np.float32(rule.num_samples) * scale * scale
    for i in range(rule.num_slots):
        q = state.position[h * rule.num_slots + i] % centred.shape[1]
        for t in range(centred.shape[0]):
            room.factors[i, t] = centred[t, q] * per_step
    room.products[:] = 0
    for t in range(0, centred.shape[0], LANES):
        rows = centred[t : t + LANES]
        for i in range(rule.num_slots):
            add_multiples(room.factors[i][t : t + LANES], rows, room.products[i])


@inlined
def _fill_columns(state: State, rule: Rule, h: int, scale: np.float32, room: Room) -> None:
    """What does not depend on the slot that the heaviest GPU `h` gives, by position of the node.

    The powers of both GPUs before, in units of 2^30, -BANNED where `h` is the partner or holds the expert; the mean of
    the replica there, and what its spread and its covariances with all of `h` add; the means of the others of its GPU,
    and the square of their deviation. On the scale of the largest score.
    """
    s, d, columns = rule.num_slots, rule.num_gpus, room.columns
    first, node = h // d * d * s, h // d * d
    for q in range(columns.shape[1]):
        columns[1, q] = np.float32(state.mean[first + q]) * scale
        columns[2, q] = np.float32(2.0 * state.spread[first + q]) * scale * scale
        columns[3, q] = np.float32(state.rest_mean[first + q]) * scale
        columns[4, q] = np.float32(state.rest_twice[first + q]) * scale * scale
    for i in range(s):
        for q in range(columns.shape[1]):
            columns[2, q] += room.products[i, q]
    for o in range(d):
        columns[0, o] = np.float32(np.float64(state.power[h] + state.power[node + o]) * UNIT)
    columns[0, h - node] = -BANNED
    for k in range(d, s * d):
        columns[0, k] = columns[0, k - d]
    for i in range(s):
        slot = state.slots[state.phy2log[h * s + i]]
        while slot != NO_SLOT:
            if state.gpu[slot] // d * d == node:
                columns[0, state.position[slot] - first] = -BANNED
            slot = state.following[slot]


@stage
def _sum_by_gpu(products: Floats, d: int, sums: Floats) -> None:
    """Fill for every position the sum of the products of its GPU."""
    sums[:d] = products[:d]
    for k in range(d, products.size, d):
        for o in range(d):
            sums[o] += products[k + o]
    for q in range(d, products.size):
        sums[q] = sums[q - d]


@inlined
def _margin(rule: Rule, potential: Potential) -> float:
    """How far a gain in float32 may be from the exact one, of two slots, in units of 2^30.

    e = 2^-24; sd(x): deviation of x, so that its spread is sd^2. An inner product of centred loads is off by less than
    (T + 4) e sd(a) sd(b), the sums of s of them by (2T + s + 16) e sd(b) times the sum of the sd(a) of a GPU, which is
    at most sqrt(s) that GPU's; twice that, over the root of something above the spread of b, and 4 (s + 1) e for the
    rest's own rounding and 24 e for means: off a score, as a part of the largest. Cutting takes 2 + z more. A power is
    off by norm times that (and a little: 1.1), integers by 2 units a power of norm.
    """
    s, t = np.float64(rule.num_slots), np.float64(rule.num_samples)
    rounding = EPSILON * (2.0 * (2.0 * t + s + 16.0) * np.sqrt(s) + 4.0 * (s + 1.0) + 24.0)
    score = rounding + (2.0 + rule.z) / max(potential.top, 1.0)
    margin: float = 2.0 * rule.norm * (1.1 * score + 4.0 * UNIT)
    return margin


@stage
def _exact_best(state: State, rule: Rule, potential: Potential, floor: int, room: Room) -> Move:
    """The first of the largest exact gains, among those whose approximate gain may be the largest."""
    s, d = rule.num_slots, rule.num_gpus
    margin, node = _margin(rule, potential), potential.heaviest // d * d
    gain, own, other = floor, NO_SLOT, NO_SLOT
    least = 2.0 * np.float64(floor) * UNIT - margin
    most = largest_of(room.best)
    for first in (True, False):  # the most promising alone at first: most of the others then need no look
        for q in range(most if first else 0, most + 1 if first else room.best.size):
            if room.best[q] < least:
                continue
            for i in range(s):
                if room.gains[i, q] < least:
                    continue
                slot = (node + q % d) * s + q // d
                exact = _exact_gain(state, rule, potential, potential.heaviest * s + i, slot)
                tied = exact == gain and other != NO_SLOT
                if exact > gain or (tied and (state.gpu[slot], i, slot) < (state.gpu[other], own, other)):
                    gain, own, other = exact, i, slot
                    least = max(least, 2.0 * np.float64(gain) * UNIT - margin)
    if other == NO_SLOT:
        return NO_MOVE
    return Move(gain, potential.heaviest * s + own, other)


@stage
def _exact_gain(state: State, rule: Rule, potential: Potential, own: int, other: int) -> int:
    """The gain a slot of swapping slot `own` of the heaviest GPU with slot `other`."""
    h, gpu, given, taken = state.gpu[own], state.gpu[other], state.phy2log[own], state.phy2log[other]
    spread = state.sums[taken, 2] - state.sums[given, 2]
    mean, square = exchanged(state.gpu_loads[h], state.replica[given], state.replica[taken])
    heavy = scores(mean, square, state.gpu_spread[h] + spread, rule)
    mean, square = exchanged(state.gpu_loads[gpu], state.replica[taken], state.replica[given])
    light = scores(mean, square, state.gpu_spread[gpu] - spread, rule)
    before = state.power[h] + state.power[gpu]
    gain: int = (before - powers(heavy, potential.top, rule.norm) - powers(light, potential.top, rule.norm)) >> 1
    return gain
