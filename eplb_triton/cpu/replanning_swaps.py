"""Replanning: swaps of a slot of the heaviest GPU with one of another GPU on its node.

They are judged by inner products: those of the slots of the heaviest GPU with all slots of its partners give what every
GPU carries afterwards. Gains are first found in float64, all at once, then exactly for those near the largest.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles, Ints
from eplb_triton.cpu.compiled import inlined, stage
from eplb_triton.cpu.replanning_potential import LANES, NO_SLOT, Potential, Rule, State, powers, scores
from eplb_triton.cpu.replanning_room import NO_MOVE, Move, Room
from eplb_triton.cpu.replanning_vectors import BANNED, UNIT, add_multiples, largest, subtract_powers


@stage
def best_swap(state: State, rule: Rule, potential: Potential, floor: int, room: Room) -> Move:
    """The swap of largest gain a slot between the heaviest GPU and another of its node; gain 0: none above `floor`.

    No swap brings an expert to a GPU that holds it. Ties: the lowest partner, then the lowest slot of the heaviest
    GPU, then of the partner.
    """
    s, h = rule.num_slots, potential.heaviest
    m = _fill_partners(state, rule, potential, floor, room.partner, room.place)
    n, node = s * m, h // rule.num_gpus * rule.num_gpus
    if m == 0:
        return NO_MOVE
    _multiply(state, rule, h, m, room)
    _fill_columns(state, rule, h, m, room)
    best = room.columns[5][:n]
    best[:] = -BANNED
    steps = np.float64(rule.num_samples)
    light_given, held = room.gpus[0][:m], room.gpus[1][:m]
    for i in range(s):
        at = state.position[h * s + i]
        products, gains, light = room.products[i][:n], room.gains[i][:n], room.light[:n]
        _sum_by_gpu(products, light_given)
        held[:] = 0
        slot = state.slots[state.phy2log[h * s + i]]
        while slot != NO_SLOT:
            o = room.place[state.gpu[slot] - node]
            if o != NO_SLOT:
                held[o] = BANNED
            slot = state.following[slot]
        for k in range(s):
            for o in range(m):
                q = k * m + o
                light[q] = products[q] - light_given[o]
                gains[q] = room.columns[4, q] - held[o]
        mean, square, spread = state.mean[at], state.square[at], state.spread[at]
        twice = steps * (square - 2 * state.products[at]) - spread
        subtract_powers(room.columns[0][:n], room.columns[1][:n], products, -mean, twice, rule, potential.top, gains)
        twice = steps * square + spread
        subtract_powers(room.columns[2][:n], room.columns[3][:n], light, mean, twice, rule, potential.top, gains)
        for q in range(n):
            best[q] = gains[q] if gains[q] > best[q] else best[q]
    return _exact_best(state, rule, potential, floor, m, room)


@inlined
def _fill_partners(state: State, rule: Rule, potential: Potential, floor: int, partner: Ints, place: Ints) -> int:
    """Fill the GPUs of the node with which a swap may gain more than `floor`, and which of them each GPU is; how many.

    The two means add up to the same after any swap, and a score is no less than the mean: so the two powers then are no
    less than twice that of half the sum.
    """
    h, m = potential.heaviest, 0
    node = h // rule.num_gpus * rule.num_gpus
    margin = np.float64(4 * rule.norm + 8)
    for gpu in range(node, node + rule.num_gpus):
        power = (state.gpu_mean[h] + state.gpu_mean[gpu]) * 0.5 / max(potential.top, 1.0)
        norm = rule.norm
        while norm > 1:
            power *= power
            norm >>= 1
        least = 2.0 * power / UNIT - margin
        place[gpu - node] = NO_SLOT
        if gpu != h and np.float64(state.power[h] + state.power[gpu]) - least > 2.0 * np.float64(floor):
            partner[m], place[gpu - node] = gpu, m
            m += 1
    if 2 * m > rule.num_gpus:  # then all of them: their loads lie side by side
        m = rule.num_gpus
        for o in range(m):
            partner[o], place[o] = node + o, o
    return m


@inlined
def _multiply(state: State, rule: Rule, h: int, m: int, room: Room) -> None:
    """Fill the inner products of the loads of the slots of GPU `h` with those of its partners."""
    s, d = rule.num_slots, rule.num_gpus
    n, node = s * m, h // d * d
    room.products[:, :n] = 0
    for t in range(0, state.loads.shape[0], LANES):
        a, b, c, e = room.rows[0][:n], room.rows[1][:n], room.rows[2][:n], room.rows[3][:n]
        if m == d:
            first, last = node * s, node * s + n
            a, b = state.loads[t][first:last], state.loads[t + 1][first:last]
            c, e = state.loads[t + 2][first:last], state.loads[t + 3][first:last]
        else:
            for lane in range(LANES):
                row, loads = room.rows[lane], state.loads[t + lane]
                for k in range(s):
                    first = (node * s) + k * d - node
                    for o in range(m):
                        row[k * m + o] = loads[first + room.partner[o]]
        for i in range(s):
            at = state.position[h * s + i]
            x, y, z, w = (
                state.loads[t, at],
                state.loads[t + 1, at],
                state.loads[t + 2, at],
                state.loads[t + 3, at],
            )
            add_multiples(x, y, z, w, a, b, c, e, room.products[i][:n])


@inlined
def _fill_columns(state: State, rule: Rule, h: int, m: int, room: Room) -> None:
    """What does not depend on the slot that the heaviest GPU `h` gives.

    For it and for the partner: mean, and T * square + spread, if it had (had not) the replica in each slot; the powers
    of both before, less a penalty where `h` holds the expert; the product of that replica and the loads of `h`.
    """
    s, steps = rule.num_slots, np.float64(rule.num_samples)
    heavy_taken = room.columns[6][: s * m]
    heavy_taken[:] = 0
    for i in range(s):
        for q in range(heavy_taken.size):
            heavy_taken[q] += room.products[i, q]
    for k in range(s):
        for o in range(m):
            q, gpu = k * m + o, room.partner[o]
            at = state.position[gpu * s + k]
            square, spread = state.square[at], state.spread[at]
            room.columns[0, q] = state.gpu_mean[h] + state.mean[at]
            room.columns[1, q] = (
                steps * (state.gpu_square[h] + square + 2 * heavy_taken[q]) + state.gpu_spread[h] + spread
            )
            room.columns[2, q] = state.gpu_mean[gpu] - state.mean[at]
            room.columns[3, q] = (
                steps * (state.gpu_square[gpu] + square - 2 * state.products[at]) + state.gpu_spread[gpu] - spread
            )
            room.columns[4, q] = np.float64(state.power[h] + state.power[gpu]) * UNIT
    node = h // rule.num_gpus * rule.num_gpus
    for i in range(s):
        slot = state.slots[state.phy2log[h * s + i]]
        while slot != NO_SLOT:
            gpu = state.gpu[slot]
            o = room.place[gpu - node]
            if o != NO_SLOT:
                room.columns[4, (slot - gpu * s) * m + o] -= BANNED
            slot = state.following[slot]


@stage
def _sum_by_gpu(products: Doubles, sums: Doubles) -> None:
    """Fill the inner products of a replica's loads with those of each GPU."""
    d = sums.size
    sums[:] = 0
    for k in range(0, products.size, d):
        for o in range(d):
            sums[o] += products[k + o]


@stage
def _exact_best(state: State, rule: Rule, potential: Potential, floor: int, m: int, room: Room) -> Move:
    """The first of the largest exact gains, among those whose approximate gain may be the largest."""
    s = rule.num_slots
    best = room.columns[5][: s * m]
    most = largest(best)
    # Two powers, each off by less than 2 * norm units: what is 8 * norm of them below the largest is not larger.
    margin = (4.0 * rule.norm + 8.0) * UNIT
    least = max(most - 2 * margin, 2.0 * np.float64(floor) * UNIT - margin)
    gain, own, other = floor, NO_SLOT, NO_SLOT
    for q in range(best.size):
        if best[q] < least:
            continue
        for i in range(s):
            if room.gains[i, q] < least:
                continue
            exact = _exact_gain(state, rule, potential, i, q, m, room)
            slot = room.partner[q % m] * s + q // m
            tied = exact == gain and other != NO_SLOT
            if exact > gain or (tied and (state.gpu[slot], i, slot) < (state.gpu[other], own, other)):
                gain, own, other = exact, i, slot
    if other == NO_SLOT:
        return NO_MOVE
    return Move(gain, potential.heaviest * s + own, other)


@inlined
def _exact_gain(state: State, rule: Rule, potential: Potential, i: int, q: int, m: int, room: Room) -> int:
    """The gain a slot of swapping slot i of the heaviest GPU with the q-th of its partners."""
    s, h = rule.num_slots, potential.heaviest
    gpu = room.partner[q % m]
    own, other = state.position[h * s + i], state.position[gpu * s + q // m]
    mean, spread = state.mean[other] - state.mean[own], state.spread[other] - state.spread[own]
    square = state.square[other] + state.square[own] - 2 * room.products[i, q]
    light_given = 0.0
    for k in range(s):
        light_given += room.products[i, k * m + q % m]
    heavy_square = state.gpu_square[h] + square + 2 * (room.columns[6, q] - state.products[own])
    light_square = state.gpu_square[gpu] + square + 2 * (light_given - state.products[other])
    heavy = scores(state.gpu_mean[h] + mean, heavy_square, state.gpu_spread[h] + spread, rule)
    light = scores(state.gpu_mean[gpu] - mean, light_square, state.gpu_spread[gpu] - spread, rule)
    before = state.power[h] + state.power[gpu]
    gain: int = (before - powers(heavy, potential.top, rule.norm) - powers(light, potential.top, rule.norm)) >> 1
    return gain
