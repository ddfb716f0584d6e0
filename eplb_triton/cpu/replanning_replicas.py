"""Replanning: moves that give an expert of the heaviest GPU one replica more, in place of one of another expert.

Every slot of an expert that can spare a replica is a *receiver*: what its GPU would carry without that replica, all
others of the donor grown, is found once; the inner products of that and the wanted expert's loads give the rest.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles
from eplb_triton.cpu.compiled import inlined, stage
from eplb_triton.cpu.replanning_potential import (
    NO_SLOT,
    Potential,
    Rule,
    State,
    powers,
    replicas_of,
    scores,
)
from eplb_triton.cpu.replanning_room import Move, ReplicaRoom
from eplb_triton.cpu.replanning_sums import sum_of, sum_product
from eplb_triton.cpu.replanning_vectors import BANNED, UNIT, largest, subtract_powers


@stage
def best_replica_move(
    state: State, rule: Rule, potential: Potential, floor: int, least: int, room: ReplicaRoom
) -> Move:
    """The move of largest gain on the node of the heaviest GPU; gain 0: none above `least`.

    The expert has fewer replicas than its node has GPUs; the donor keeps at least one. The expert is passed over if one
    replica more, not yet received by any GPU, gains no more than `floor`.

    Ties: the expert in the lowest slot, then the lowest donor, then the lowest receiver; its lowest slot of the donor.
    """
    num_wanted = _fill_wanted(state, rule, potential, floor, room)
    room.looked_at[:] = False
    n = _fill_receivers(state, rule, potential, room) if num_wanted > 0 else 0
    if n == 0:
        return Move(0, NO_SLOT, NO_SLOT)
    margin = (2.0 * rule.norm + 4.0) * UNIT  # of a gain: a power is off by less than 2 * norm units
    enough = np.float64(least) * UNIT - margin
    for w in range(num_wanted):
        _fill_shared(state, rule, potential, w, room)
        room.most[w] = _fill_bounds(state, rule, potential, w, n, room)
    for _ in range(num_wanted):  # the most promising first: most of the others then need no look
        w = int(np.argmax(room.most[:num_wanted]))
        if room.most[w] < enough:
            break
        _fill_gains(state, rule, potential, w, n, room)
        enough = max(enough, largest(room.gains[w][:n]) - 2 * margin)
        room.most[w] = -BANNED
        room.looked_at[w] = True
    best, receiver, which = least, NO_SLOT, NO_SLOT
    for w in range(num_wanted):
        if room.looked_at[w]:
            for r in range(n):
                if room.gains[w, r] >= enough:
                    gain = _exact_gain(state, rule, potential, w, r, room)
                    if gain > best:
                        best, receiver, which = gain, r, w
    if which == NO_SLOT:
        return Move(0, NO_SLOT, NO_SLOT)
    return Move(best, room.slot[receiver], room.wanted.expert[which])


@inlined
def _fill_wanted(state: State, rule: Rule, potential: Potential, floor: int, room: ReplicaRoom) -> int:
    """Fill the distinct experts of the heaviest GPU that are worth one replica more; how many they are."""
    first, node = potential.heaviest * rule.num_slots, potential.heaviest // rule.num_gpus * rule.num_gpus
    wanted, n = room.wanted, 0
    for slot in range(first, first + rule.num_slots):
        expert = state.phy2log[slot]
        again = False
        for earlier in range(first, slot):
            again = again or state.phy2log[earlier] == expert
        if again or state.counts[expert] >= rule.num_gpus:
            continue
        mean, square, spread = _fill_change(
            state.samples[expert],
            state.replica[expert],
            state.counts[expert] + 1,
            rule.num_samples,
            wanted.loads[n],
            wanted.difference[n],
        )
        wanted.expert[n], wanted.mean[n], wanted.square[n], wanted.spread[n] = expert, mean, square, spread
        wanted.spread_difference[n] = spread - state.spread[state.position[slot]]
        wanted.fall[n] = 0
        room.wanted_falls[n] = 0
        held = state.slots[expert]
        while held != NO_SLOT:
            gpu, times = state.gpu[held], 0
            while held != NO_SLOT and state.gpu[held] == gpu:
                times += 1
                held = state.following[held]
            for t in range(room.row.size):
                room.row[t] = state.gpu_loads[gpu, t] + times * wanted.difference[n, t]
            spread = state.gpu_spread[gpu] + times * wanted.spread_difference[n]
            fall = state.power[gpu] - _power(room.row, spread, rule, potential.top)
            room.wanted_falls[n, gpu - node] = fall
            wanted.fall[n] += fall
        n += 1 if wanted.fall[n] > floor else 0
    return n


@stage
def _fill_change(
    samples: Doubles, now: Doubles, count: int, num_samples: int, loads: Doubles, difference: Doubles
) -> tuple[float, float, float]:
    """Fill the loads [T] of one of `count` replicas of an expert, and how much more than `now` they are; as
    `replicas_of`."""
    sums = replicas_of(samples, count, num_samples, loads)
    for t in range(loads.size):
        difference[t] = loads[t] - now[t]
    return sums


@stage
def _power(loads: Doubles, spread: float, rule: Rule, top: float) -> int:
    """The power of a GPU that carries `loads`."""
    return powers(scores(sum_of(loads), sum_product(loads, loads), spread, rule), top, rule.norm)


@inlined
def _fill_receivers(state: State, rule: Rule, potential: Potential, room: ReplicaRoom) -> int:
    """Fill donors and receivers on the node of the heaviest GPU; how many receivers there are."""
    node, donors = potential.heaviest // rule.num_gpus * rule.num_gpus, room.donors
    k, n = 0, 0
    for expert in range(state.counts.size):
        room.donor_of[expert] = NO_SLOT
        if state.counts[expert] < 2 or not node <= state.gpu[state.slots[expert]] < node + rule.num_gpus:
            continue
        donor_mean, donor_square, donor_spread = _fill_change(
            state.samples[expert],
            state.replica[expert],
            state.counts[expert] - 1,
            rule.num_samples,
            donors.loads[k],
            donors.difference[k],
        )
        donors.expert[k], donors.spread[k] = expert, donor_spread
        difference = donor_spread - state.spread[state.position[state.slots[expert]]]
        room.donor_of[expert], room.first[k], donors.fall[k] = k, n, 0
        slot = state.slots[expert]
        while slot != NO_SLOT:
            gpu, times = state.gpu[slot], 0
            room.slot[n], room.gpu[n] = slot, gpu - node
            while slot != NO_SLOT and state.gpu[slot] == gpu:
                times += 1
                slot = state.following[slot]
            rest, given = room.rest[n], donors.loads[k]
            for t in range(rest.size):
                rest[t] = state.gpu_loads[gpu, t] + times * donors.difference[k, t] - given[t]
            mean, square = sum_of(rest), sum_product(rest, rest)
            spread = state.gpu_spread[gpu] + times * difference
            carried = square + 2 * sum_product(rest, given) + donor_square
            score = scores(mean + donor_mean, carried, spread, rule)
            room.fall[n] = state.power[gpu] - powers(score, potential.top, rule.norm)
            donors.fall[k] += room.fall[n]
            room.sums[0, n], room.sums[2, n] = mean, spread - donor_spread
            room.sums[1, n] = rule.num_samples * square + room.sums[2, n]
            n += 1
        for r in range(room.first[k], n):
            room.donor[r] = k
            room.offset[r] = donors.fall[k] - room.fall[r] + state.power[node + room.gpu[r]]
        k += 1
    room.first[k] = n
    return n


@inlined
def _fill_shared(state: State, rule: Rule, potential: Potential, w: int, room: ReplicaRoom) -> None:
    """What the GPUs that hold a wanted expert and a donor fall, beyond the two falls of each expert alone."""
    wanted, donors, row = room.wanted, room.donors, room.row
    room.shared[w] = 0
    expert = wanted.expert[w]
    node = potential.heaviest // rule.num_gpus * rule.num_gpus
    slot = state.slots[expert]
    while slot != NO_SLOT:
        gpu, times = state.gpu[slot], 0
        while slot != NO_SLOT and state.gpu[slot] == gpu:
            times += 1
            slot = state.following[slot]
        for held in range(gpu * rule.num_slots, (gpu + 1) * rule.num_slots):
            k = room.donor_of[state.phy2log[held]]
            if k == NO_SLOT or donors.expert[k] == expert:
                continue
            for r in range(room.first[k], room.first[k + 1]):
                if room.slot[r] != held:  # the lowest slot of the donor there stands for all
                    continue
                for t in range(row.size):
                    row[t] = room.rest[r, t] + donors.loads[k, t] + times * wanted.difference[w, t]
                spread = room.sums[2, r] + donors.spread[k] + times * wanted.spread_difference[w]
                fall = state.power[gpu] - _power(row, spread, rule, potential.top)
                room.shared[w, k] += fall - room.fall[r] - room.wanted_falls[w, gpu - node]


@inlined
def _fill_bounds(state: State, rule: Rule, potential: Potential, w: int, n: int, room: ReplicaRoom) -> float:
    """Fill the gains of all receivers of the w-th wanted expert were they without load then; the largest.

    In float64, BANNED off where the GPU holds it.
    """
    wanted, gains = room.wanted, room.gains[w][:n]
    node = potential.heaviest // rule.num_gpus * rule.num_gpus
    for r in range(n):
        gains[r] = np.float64(room.offset[r] + room.shared[w, room.donor[r]] + wanted.fall[w]) * UNIT
    own = room.donor_of[wanted.expert[w]]
    if own != NO_SLOT:
        gains[room.first[own] : room.first[own + 1]] -= BANNED
    slot = state.slots[wanted.expert[w]]
    while slot != NO_SLOT:
        gpu = state.gpu[slot] - node
        for r in range(n):
            gains[r] -= BANNED if room.gpu[r] == gpu else 0.0
        slot = state.following[slot]
    return largest(gains)


@inlined
def _fill_gains(state: State, rule: Rule, potential: Potential, w: int, n: int, room: ReplicaRoom) -> None:
    """Make the bounds of the w-th wanted expert the gains, in float64."""
    wanted, gains = room.wanted, room.gains[w][:n]
    products = room.products[:n]
    for r in range(n):
        products[r] = -sum_product(room.rest[r], wanted.loads[w])
    twice = rule.num_samples * wanted.square[w] + wanted.spread[w]
    subtract_powers(room.sums[0][:n], room.sums[1][:n], products, wanted.mean[w], twice, rule, potential.top, gains)


@inlined
def _exact_gain(state: State, rule: Rule, potential: Potential, w: int, r: int, room: ReplicaRoom) -> int:
    """The gain of giving the w-th wanted expert the slot of receiver r."""
    wanted, row = room.wanted, room.row
    for t in range(row.size):
        row[t] = room.rest[r, t] + wanted.loads[w, t]
    power = _power(row, room.sums[2, r] + wanted.spread[w], rule, potential.top)
    gain: int = wanted.fall[w] + room.shared[w, room.donor[r]] + room.offset[r] - power
    return gain
