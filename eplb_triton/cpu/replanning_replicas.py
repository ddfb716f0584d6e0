"""Replanning: moves that give an expert of the heaviest GPU one replica more, in place of one of another expert."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_triton.cpu.arith import Doubles, Flags, Ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import (
    NO_SLOT,
    Potential,
    Rule,
    State,
    position,
    powers,
    replicas_of,
    scores,
    sum_of,
    sum_product,
)


class Move(NamedTuple):
    """What a move gains a written slot, and what it writes; gain 0: no move."""

    gain: int
    slot: int
    other: int  # the slot that is swapped with it, or the expert that comes there


class Change(NamedTuple):
    """What becomes of a few experts if each had one replica more, or fewer."""

    expert: Ints  # [n]
    loads: Doubles  # [n, T], of one replica then
    difference: Doubles  # [n, T], of that and one now
    spread: Doubles  # [n], of one replica then
    spread_difference: Doubles  # [n]
    fall: Ints  # [n], of F, nobody receiving or giving yet
    falls: Ints  # [n, d], of the power of each GPU of the node


@stage
def _new_change(num_experts: int, width: int, num_gpus: int) -> Change:
    return Change(
        np.empty(num_experts, np.int64),
        np.empty((num_experts, width), np.float64),
        np.empty((num_experts, width), np.float64),
        np.empty(num_experts, np.float64),
        np.empty(num_experts, np.float64),
        np.empty(num_experts, np.int64),
        np.zeros((num_experts, num_gpus), np.int64),
    )


@stage
def best_replica_move(state: State, rule: Rule, potential: Potential, floor: int, least: int) -> Move:
    """The move of largest gain on the node of the heaviest GPU; gain 0: none above `least`.

    The expert has fewer replicas than its node has GPUs; the donor keeps at least one. The expert is passed over if one
    replica more, not yet received by any GPU, gains no more than `floor`.

    Ties: the expert in the lowest slot, then the lowest donor, then the lowest receiver; its lowest slot of the donor.
    """
    d, node = rule.num_gpus, potential.heaviest // rule.num_gpus * rule.num_gpus
    width = state.samples.shape[1]
    wanted = _new_change(rule.num_slots, width, d)
    num_wanted = _fill_wanted(state, rule, potential, floor, wanted)
    best, slot, which = least, NO_SLOT, NO_SLOT
    if num_wanted == 0:
        return Move(np.int64(0), NO_SLOT, NO_SLOT)
    donor = _new_change(1, width, d)
    carried, row = np.empty((d, width), np.float64), np.empty(width, np.float64)
    spreads, done = np.empty(d, np.float64), np.zeros(1, np.bool_)
    for b in range(state.counts.size):
        if state.counts[b] < 2 or not node <= state.slots[b] // rule.num_slots < node + d:
            continue
        done[0] = False
        for w in range(num_wanted):
            if wanted.expert[w] == b:
                continue
            _fill_donor(state, rule, potential, b, donor, carried, spreads, done)
            base = (
                donor.fall[0]
                + wanted.fall[w]
                + _shared_fall(state, rule, potential, wanted, w, donor, carried, spreads, row)
            )
            last = NO_SLOT
            s = state.slots[b]
            while s != NO_SLOT:
                gpu = s // rule.num_slots
                if gpu != last and not _holds(state, rule, wanted.expert[w], gpu):
                    fall = _received(state, rule, potential, wanted, w, donor, carried, spreads, gpu, row)
                    gain = base - donor.falls[0, gpu - node] + fall
                    if gain > best or (gain == best and which != NO_SLOT and w < which):
                        best, slot, which = gain, s, w
                last = gpu
                s = state.following[s]
    if which == NO_SLOT:
        return Move(np.int64(0), NO_SLOT, NO_SLOT)
    return Move(best, slot, wanted.expert[which])


@stage
def _fill_wanted(state: State, rule: Rule, potential: Potential, floor: int, wanted: Change) -> int:
    """Fill the distinct experts of the heaviest GPU that are worth one replica more; how many they are."""
    first = potential.heaviest * rule.num_slots
    n = 0
    for slot in range(first, first + rule.num_slots):
        expert = state.phy2log[slot]
        again = False
        for earlier in range(first, slot):
            again = again or state.phy2log[earlier] == expert
        if again or state.counts[expert] >= rule.num_gpus:
            continue
        _fill_change(state, rule, expert, np.int64(1), wanted, n)
        _fill_falls(state, rule, potential, wanted, n)
        n += 1 if wanted.fall[n] > floor else 0
    return n


@stage
def _fill_change(state: State, rule: Rule, expert: int, more: int, change: Change, k: int) -> None:
    """Fill the k-th of a change: `expert` with `more` replicas."""
    change.expert[k] = expert
    count = state.counts[expert] + more
    _, _, spread = replicas_of(state.samples[expert], count, rule.num_samples, change.loads[k])
    at = position(state.slots[expert], rule)
    for t in range(change.loads.shape[1]):
        change.difference[k, t] = change.loads[k, t] - state.loads[t, at]
    change.spread[k], change.spread_difference[k] = spread, spread - state.spread[at]


@stage
def _times_on(state: State, rule: Rule, slot: int) -> int:
    """How many slots of the GPU of `slot` hold its expert, from `slot` on."""
    times, gpu, following = 1, slot // rule.num_slots, state.following[slot]
    while following != NO_SLOT and following // rule.num_slots == gpu:
        times += 1
        following = state.following[following]
    return times


@stage
def _fall(state: State, rule: Rule, potential: Potential, gpu: int, loads: Doubles, spread: float) -> int:
    """How far the power of a GPU falls if it carries `loads`."""
    score = scores(sum_of(loads), sum_product(loads, loads), spread, rule)
    fall: int = state.power[gpu] - powers(score, potential.top, rule.norm)
    return fall


@stage
def _fill_falls(state: State, rule: Rule, potential: Potential, change: Change, k: int) -> None:
    """Fill how far the powers of the GPUs that hold the k-th expert fall."""
    node = potential.heaviest // rule.num_gpus * rule.num_gpus
    row = np.empty(change.loads.shape[1], np.float64)
    change.fall[k], last, slot = 0, NO_SLOT, state.slots[change.expert[k]]
    while slot != NO_SLOT:
        gpu = slot // rule.num_slots
        if gpu != last:
            times = np.float64(_times_on(state, rule, slot))
            for t in range(row.size):
                row[t] = state.gpu_loads[gpu, t] + times * change.difference[k, t]
            spread = state.gpu_spread[gpu] + times * change.spread_difference[k]
            change.falls[k, gpu - node] = _fall(state, rule, potential, gpu, row, spread)
            change.fall[k] += change.falls[k, gpu - node]
        last = gpu
        slot = state.following[slot]


@stage
def _fill_donor(
    state: State,
    rule: Rule,
    potential: Potential,
    expert: int,
    donor: Change,
    carried: Doubles,
    spreads: Doubles,
    done: Flags,
) -> None:
    """Once: fill the donor with one replica fewer, and what its GPUs would carry, nobody giving one up yet."""
    if done[0]:
        return
    done[0] = True
    node = potential.heaviest // rule.num_gpus * rule.num_gpus
    _fill_change(state, rule, expert, np.int64(-1), donor, np.int64(0))
    donor.fall[0], last, slot = 0, NO_SLOT, state.slots[expert]
    while slot != NO_SLOT:
        gpu = slot // rule.num_slots
        if gpu != last:
            times, o = np.float64(_times_on(state, rule, slot)), gpu - node
            for t in range(carried.shape[1]):
                carried[o, t] = state.gpu_loads[gpu, t] + times * donor.difference[0, t]
            spreads[o] = state.gpu_spread[gpu] + times * donor.spread_difference[0]
            donor.falls[0, o] = _fall(state, rule, potential, gpu, carried[o], spreads[o])
            donor.fall[0] += donor.falls[0, o]
        last = gpu
        slot = state.following[slot]


@stage
def _shared_fall(
    state: State,
    rule: Rule,
    potential: Potential,
    wanted: Change,
    w: int,
    donor: Change,
    carried: Doubles,
    spreads: Doubles,
    row: Doubles,
) -> int:
    """What the GPUs that hold both experts fall, beyond the two falls of each expert alone."""
    node = potential.heaviest // rule.num_gpus * rule.num_gpus
    fall, last, slot = 0, NO_SLOT, state.slots[wanted.expert[w]]
    while slot != NO_SLOT:
        gpu = slot // rule.num_slots
        o = gpu - node
        if gpu != last and _holds(state, rule, donor.expert[0], gpu):
            times = np.float64(_times_on(state, rule, slot))
            for t in range(row.size):
                row[t] = carried[o, t] + times * wanted.difference[w, t]
            spread = spreads[o] + times * wanted.spread_difference[w]
            fall += _fall(state, rule, potential, gpu, row, spread) - wanted.falls[w, o] - donor.falls[0, o]
        last = gpu
        slot = state.following[slot]
    return fall


@stage
def _received(
    state: State,
    rule: Rule,
    potential: Potential,
    wanted: Change,
    w: int,
    donor: Change,
    carried: Doubles,
    spreads: Doubles,
    gpu: int,
    row: Doubles,
) -> int:
    """How far the power of a GPU falls that gives up a replica of the donor for one of the wanted expert."""
    o = gpu % rule.num_gpus
    for t in range(row.size):
        row[t] = carried[o, t] + (wanted.loads[w, t] - donor.loads[0, t])
    return _fall(state, rule, potential, gpu, row, spreads[o] + wanted.spread[w] - donor.spread[0])


@stage
def _holds(state: State, rule: Rule, expert: int, gpu: int) -> bool:
    slot = state.slots[expert]
    while slot != NO_SLOT:
        if slot // rule.num_slots == gpu:
            return True
        slot = state.following[slot]
    return False
