"""Replanning: from a placement to a better one, by the move that gains most a written slot, again and again.

A swap is judged by inner products: those of the slots of the heaviest GPU with all slots of its node give what every
GPU carries afterwards. Gains are first found in float64, all at once, then exactly for those near the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_triton.cpu.arith import Doubles
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import (
    LANES,
    NO_SLOT,
    Potential,
    Rule,
    State,
    gpus_of,
    least_gain,
    link_slots,
    potential_of,
    powers,
    scores,
    set_replicas,
)
from eplb_triton.cpu.replanning_replicas import Move, ReplicaRoom, best_replica_move, new_replica_room
from eplb_triton.cpu.replanning_vectors import BANNED, UNIT, add_multiples, largest, subtract_powers

NO_MOVE = Move(np.int64(0), NO_SLOT, NO_SLOT)


class Room(NamedTuple):
    """For the search of a swap; s slots of the heaviest GPU, n positions of its node."""

    products: Doubles  # [s, n], inner products
    gains: Doubles  # [s, n]
    light: Doubles  # [n], of one slot of the heaviest GPU
    columns: Doubles  # [7, n], see _fill_columns; the sixth: the largest gain of each position
    gpus: Doubles  # [2, d]
    replicas: ReplicaRoom


@stage
def new_room(num_experts: int, num_slots: int, num_gpus: int, width: int) -> Room:
    """Room for moves on nodes of `num_gpus` GPUs; `width`: T, as in State."""
    n = num_slots * num_gpus
    return Room(
        np.empty((num_slots, n), np.float64),
        np.empty((num_slots, n), np.float64),
        np.empty(n, np.float64),
        np.empty((7, n), np.float64),
        np.empty((2, num_gpus), np.float64),
        new_replica_room(num_experts, num_slots, num_gpus, width),
    )


@stage
def improve(
    state: State, rule: Rule, price: float, most_slots: int, most_moves: int, change_counts: bool, room: Room
) -> tuple[int, float]:
    """Move until nothing pays, and at most `most_moves` times: (moves made, J).

    A move is a swap of a slot of the GPU of largest score with one of another GPU on its node, or, with
    `change_counts`, one replica more of an expert of that GPU in place of one of another expert. A swap writes two
    slots, another move one; a layer writes at most `most_slots`.

    Ties: the lowest GPU of largest score; swaps before other moves, then as the candidates are listed.
    """
    written = np.int64(0)
    potential = potential_of(state, rule)
    for made in range(most_moves):
        floor = least_gain(price, potential, rule.norm)
        move, width = NO_MOVE, 1
        if written + 2 <= most_slots:
            move, width = _best_swap(state, rule, potential, floor, room), 2
        if change_counts and written + 1 <= most_slots:
            other = best_replica_move(state, rule, potential, floor, max(floor, move.gain), room.replicas)
            if other.gain > 0:
                move, width = other, 1
        if move.gain == 0:
            return made, potential.peak
        if width == 2:
            _swap(state, rule, move)
        else:
            _rewrite(state, rule, move)
        written += width
        potential = potential_of(state, rule)
    return most_moves, potential.peak


@stage
def _swap(state: State, rule: Rule, move: Move) -> None:
    """Exchange the experts of slots `move.slot` and `move.other`."""
    a, b = state.phy2log[move.slot], state.phy2log[move.other]
    state.phy2log[move.slot], state.phy2log[move.other] = b, a
    link_slots(state)
    loads = np.empty(state.samples.shape[1], np.float64)
    set_replicas(state, rule, a, loads)
    set_replicas(state, rule, b, loads)
    gpus_of(state, rule, move.slot // rule.num_slots)
    gpus_of(state, rule, move.other // rule.num_slots)


@stage
def _rewrite(state: State, rule: Rule, move: Move) -> None:
    """Put expert `move.other` into slot `move.slot`."""
    given, taken = state.phy2log[move.slot], move.other
    state.phy2log[move.slot] = taken
    state.counts[given] -= 1
    state.counts[taken] += 1
    link_slots(state)
    loads = np.empty(state.samples.shape[1], np.float64)
    last = move.slot // rule.num_slots
    gpu_of_slot = rule.num_slots
    for expert in (given, taken):
        set_replicas(state, rule, expert, loads)
    gpus_of(state, rule, last)
    for expert in (given, taken):
        slot = state.slots[expert]
        while slot != NO_SLOT:
            if slot // gpu_of_slot != last:
                last = slot // gpu_of_slot
                gpus_of(state, rule, last)
            slot = state.following[slot]


@stage
def _best_swap(state: State, rule: Rule, potential: Potential, floor: int, room: Room) -> Move:
    """The swap of largest gain a slot between the heaviest GPU and another of its node; gain 0: none above `floor`.

    No swap brings an expert to a GPU that holds it. Ties: the lowest partner, then the lowest slot of the heaviest
    GPU, then of the partner.
    """
    s, d, h = rule.num_slots, rule.num_gpus, potential.heaviest
    node = h // d * d  # GPU
    first = node * s  # position
    _multiply(state, rule, h, first, room.products)
    _fill_columns(state, rule, h, first, room)
    heavy_mean, heavy_twice, light_mean, light_twice, before, best, heavy_taken = (
        room.columns[0],
        room.columns[1],
        room.columns[2],
        room.columns[3],
        room.columns[4],
        room.columns[5],
        room.columns[6],
    )
    best[:] = -BANNED
    steps = np.float64(rule.num_samples)
    light_given, held = room.gpus[0], room.gpus[1]
    for i in range(s):
        at = first + i * d + h - node
        _sum_by_gpu(room.products[i], light_given)
        _holders(state, rule, state.phy2log[h * s + i], node, held)
        gains, mean, square, spread = room.gains[i], state.mean[at], state.square[at], state.spread[at]
        for k in range(s):
            for o in range(d):
                q = k * d + o
                room.light[q] = room.products[i, q] - light_given[o]
                gains[q] = before[q] - held[o]
        twice = steps * (square - 2 * heavy_taken[at - first]) - spread
        subtract_powers(heavy_mean, heavy_twice, room.products[i], -mean, twice, rule, potential.top, gains)
        twice = steps * square + spread
        subtract_powers(light_mean, light_twice, room.light, mean, twice, rule, potential.top, gains)
        for q in range(gains.size):
            best[q] = gains[q] if gains[q] > best[q] else best[q]
    return _exact_best(state, rule, potential, floor, room)


@stage
def _multiply(state: State, rule: Rule, gpu: int, first: int, products: Doubles) -> None:
    """Fill [s, n]: inner products of the loads of the slots of a GPU with those of all positions of its node."""
    n = products.shape[1]
    products[:] = 0
    for t in range(0, state.loads.shape[0], LANES):
        a, b, c, e = state.loads[t], state.loads[t + 1], state.loads[t + 2], state.loads[t + 3]
        a, b, c, e = a[first : first + n], b[first : first + n], c[first : first + n], e[first : first + n]
        for i in range(products.shape[0]):
            at = i * rule.num_gpus + gpu % rule.num_gpus
            add_multiples(a[at], b[at], c[at], e[at], a, b, c, e, products[i])


@stage
def _fill_columns(state: State, rule: Rule, h: int, first: int, room: Room) -> None:
    """What does not depend on the slot that the heaviest GPU `h` gives.

    For it and for the partner: mean, and T * square + spread, if it had (had not) the replica in each position; the
    powers of both before, less a penalty where `h` holds the expert; the product of that replica and the loads of `h`.
    """
    s, d, steps = rule.num_slots, rule.num_gpus, np.float64(rule.num_samples)
    node = h // d * d
    heavy_taken = room.columns[6]
    heavy_taken[:] = 0
    for i in range(s):
        for q in range(heavy_taken.size):
            heavy_taken[q] += room.products[i, q]
    power = state.power[h]
    for k in range(s):
        for o in range(d):
            q, gpu = k * d + o, node + o
            at = first + q
            square, spread = state.square[at], state.spread[at]
            room.columns[0, q] = state.gpu_mean[h] + state.mean[at]
            room.columns[1, q] = (
                steps * (state.gpu_square[h] + square + 2 * heavy_taken[q]) + state.gpu_spread[h] + spread
            )
            room.columns[2, q] = state.gpu_mean[gpu] - state.mean[at]
            room.columns[3, q] = (
                steps * (state.gpu_square[gpu] + square - 2 * state.products[at]) + state.gpu_spread[gpu] - spread
            )
            room.columns[4, q] = np.float64(power + state.power[gpu]) * UNIT
    for i in range(s):
        slot = state.slots[state.phy2log[h * s + i]]
        while slot != NO_SLOT:
            gpu = slot // s
            if node <= gpu < node + d:
                room.columns[4, slot % s * d + gpu - node] -= BANNED
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
def _holders(state: State, rule: Rule, expert: int, node: int, held: Doubles) -> None:
    """Fill BANNED for each GPU of a node that holds an expert, 0 for the others."""
    held[:] = 0
    slot = state.slots[expert]
    while slot != NO_SLOT:
        gpu = slot // rule.num_slots - node
        if 0 <= gpu < held.size:
            held[gpu] = BANNED
        slot = state.following[slot]


@stage
def _exact_best(state: State, rule: Rule, potential: Potential, floor: int, room: Room) -> Move:
    """The first of the largest exact gains, among those whose approximate gain may be the largest."""
    s, d, h = rule.num_slots, rule.num_gpus, potential.heaviest
    node = h // d * d
    best = room.columns[5]
    most = largest(best)
    # Two powers, each off by less than 2 * norm units: what is 4 * norm of them below the largest is not larger.
    margin = (4.0 * rule.norm + 8.0) * UNIT
    least = max(most - 2 * margin, 2.0 * np.float64(floor) * UNIT - margin)
    gain, own, other = np.int64(floor), NO_SLOT, NO_SLOT
    if most < least:
        return Move(np.int64(0), NO_SLOT, NO_SLOT)
    for q in range(best.size):
        if best[q] < least:
            continue
        for i in range(s):
            if room.gains[i, q] < least:
                continue
            exact = _exact_gain(state, rule, potential, i, q, room)
            slot = (node + q % d) * s + q // d
            tied = exact == gain and other != NO_SLOT
            if exact > gain or (tied and _before(slot // s, i, slot, other // s, own, other)):
                gain, own, other = exact, i, slot
    if other == NO_SLOT:
        return Move(np.int64(0), NO_SLOT, NO_SLOT)
    return Move(gain, h * s + own, other)


@stage
def _before(partner: int, i: int, slot: int, other_partner: int, other_i: int, other_slot: int) -> bool:
    """Whether (partner, i, slot) comes before the other."""
    if partner != other_partner:
        return partner < other_partner
    return i < other_i if i != other_i else slot < other_slot


@stage
def _exact_gain(state: State, rule: Rule, potential: Potential, i: int, q: int, room: Room) -> int:
    """The gain a slot of swapping slot i of the heaviest GPU with position q of its node."""
    s, d, h = rule.num_slots, rule.num_gpus, potential.heaviest
    node = h // d * d
    own, other, gpu = node * s + i * d + h - node, node * s + q, node + q % d
    mean, spread = state.mean[other] - state.mean[own], state.spread[other] - state.spread[own]
    square = state.square[other] + state.square[own] - 2 * room.products[i, q]
    light_given = 0.0
    for k in range(s):
        light_given += room.products[i, k * d + q % d]
    heavy_taken = room.columns[6]
    heavy_square = state.gpu_square[h] + square + 2 * (heavy_taken[q] - heavy_taken[own - node * s])
    light_square = state.gpu_square[gpu] + square + 2 * (light_given - state.products[other])
    heavy = scores(state.gpu_mean[h] + mean, heavy_square, state.gpu_spread[h] + spread, rule)
    light = scores(state.gpu_mean[gpu] - mean, light_square, state.gpu_spread[gpu] - spread, rule)
    before = state.power[h] + state.power[gpu]
    gain: int = (before - powers(heavy, potential.top, rule.norm) - powers(light, potential.top, rule.norm)) >> 1
    return gain
