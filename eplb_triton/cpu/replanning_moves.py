"""Replanning: from a placement to a better one, by the move that gains most a written slot, again and again."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import (
    NO_SLOT,
    Rule,
    State,
    gpus_of,
    least_gain,
    link_slots,
    potential_of,
    set_replicas,
    set_slot,
)
from eplb_triton.cpu.replanning_replicas import best_replica_move
from eplb_triton.cpu.replanning_room import NO_MOVE, Move, Room
from eplb_triton.cpu.replanning_swaps import best_swap


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
        if change_counts and written + 1 <= most_slots:  # first, as it leaves few swaps to look at
            move = best_replica_move(state, rule, potential, floor, floor, room.replicas)
        if written + 2 <= most_slots:
            other = best_swap(state, rule, potential, max(floor, move.gain - 1), room)
            if other.gain > 0:
                move, width = other, 2
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
    for slot in (move.slot, move.other):
        set_slot(state, rule, slot)
        gpus_of(state, rule, state.gpu[slot])


@stage
def _rewrite(state: State, rule: Rule, move: Move) -> None:
    """Put expert `move.other` into slot `move.slot`."""
    given, taken = state.phy2log[move.slot], move.other
    state.phy2log[move.slot] = taken
    state.counts[given] -= 1
    state.counts[taken] += 1
    link_slots(state)
    for expert in (given, taken):
        set_replicas(state, rule, expert)
        slot = state.slots[expert]
        while slot != NO_SLOT:
            set_slot(state, rule, slot)
            slot = state.following[slot]
    last = state.gpu[move.slot]
    gpus_of(state, rule, last)
    for expert in (given, taken):
        slot = state.slots[expert]
        while slot != NO_SLOT:
            if state.gpu[slot] != last:
                last = state.gpu[slot]
                gpus_of(state, rule, last)
            slot = state.following[slot]
