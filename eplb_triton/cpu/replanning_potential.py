"""Replanning: what a placement is worth on the samples, kept while single slots change.

Whole numbers below 2^53 are float64 here, which vectors are made of: sums of them are exact in any order. A slot has a
*position*: those of a node follow each other, its GPUs side by side, so that what they have in slot s is a vector.

Beside the exact numbers there are the loads of all positions less their means, rounded to float32: their inner products
are T times covariances, with nothing to cancel. They only say which moves deserve an exact look.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_triton.constants import LOAD_UNITS, MOST_FLOOR, POWER_BITS, POWER_LIMIT
from eplb_triton.cpu.arith import Doubles, Floats, Ints, double_rows, doubles, ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_sums import add_to, sum_of, sum_product

LANES = 8  # samples are filled up with zeros to a multiple
SHIFT, ONE, LIMIT = np.int64(POWER_BITS), np.int64(1 << POWER_BITS), np.int64(POWER_LIMIT)
NO_SLOT = np.int64(-1)


class State(NamedTuple):
    """One layer's placement and everything that follows from it; T is a multiple of LANES."""

    samples: Doubles  # [E, T]
    phy2log: Ints  # [P]
    counts: Ints  # [E]
    slots: Ints  # [E], lowest slot of each expert
    following: Ints  # [P], the next slot of the same expert, or NO_SLOT
    gpu: Ints  # [P], of each slot; a table, as is the next: a division takes longer than what it is for
    position: Ints  # [P], of each slot
    replica: Doubles  # [E, T], loads of one replica of each expert, in each sample
    sums: Doubles  # [E, 3], of that: sum over the samples, sum of squares, spread: T^2 times its variance
    centred: Floats  # [N, T, P / N], T times the load of the replica in each position, less the sum over the samples
    mean: Doubles  # [P], sum of the loads of the replica in each position
    spread: Doubles  # [P]
    rest_mean: Doubles  # [P], sum of the loads of its GPU without it
    rest_twice: Doubles  # [P], T^2 times their variance, and the spreads of the other replicas
    gpu_loads: Doubles  # [D, T]
    gpu_mean: Doubles  # [D]
    gpu_square: Doubles  # [D]
    gpu_spread: Doubles  # [D], sum of the spreads of its replicas
    gpu_least: Doubles  # [D], z deviations are at least that after any swap
    score: Doubles  # [D]
    power: Ints  # [D], of `potential_of`


class Rule(NamedTuple):
    """How a placement is judged, and the sizes."""

    num_samples: int  # of this layer
    z: float
    norm: int
    num_gpus: int  # of a node
    num_slots: int  # of a GPU


class Potential(NamedTuple):
    """The state that the gain of a move is measured against."""

    heaviest: int  # GPU of largest score; ties: lowest
    top: float  # its score
    sum: int  # F: powers of all GPUs
    peak: float  # J


@stage
def new_state(num_experts: int, num_replicas: int, num_gpus: int, num_nodes: int, most_samples: int) -> State:
    """Room for the state of a layer; the tables are filled."""
    width = (most_samples + LANES - 1) // LANES * LANES
    p, d, s, of_node = num_replicas, num_gpus, num_replicas // num_gpus, num_gpus // num_nodes
    gpu, position = ints(p), ints(p)
    for slot in range(p):
        gpu[slot] = slot // s
        position[slot] = (gpu[slot] // of_node * s + slot % s) * of_node + gpu[slot] % of_node
    return State(
        np.zeros((num_experts, width), np.float64),
        ints(p),
        ints(num_experts),
        ints(num_experts),
        ints(p),
        gpu,
        position,
        double_rows(num_experts, width),
        double_rows(num_experts, 3),
        np.zeros((num_nodes, width, p // num_nodes), np.float32),
        doubles(p),
        doubles(p),
        doubles(p),
        doubles(p),
        double_rows(d, width),
        doubles(d),
        doubles(d),
        doubles(d),
        doubles(d),
        doubles(d),
        ints(d),
    )


@stage
def replicas_of(samples: Doubles, count: int, num_samples: int, loads: Doubles) -> tuple[float, float, float]:
    """Fill `loads` [T] of one of `count` replicas of an expert; their sum, the sum of their squares, the spread."""
    if count == 1:
        loads[:] = samples
    else:
        divisor = np.float64(count)
        for t in range(loads.size):
            loads[t] = np.floor(samples[t] / divisor)  # below 2^22: a rounded quotient is not cut to the wrong one
    mean, square = sum_of(loads), sum_product(loads, loads)
    return mean, square, num_samples * square - mean * mean


@stage
def state_of(state: State, rule: Rule) -> None:
    """Fill everything that follows from `samples` and `phy2log`."""
    state.counts[:] = 0
    for slot in range(state.phy2log.size):
        state.counts[state.phy2log[slot]] += 1
    link_slots(state)
    for expert in range(state.counts.size):
        if state.counts[expert] > 0:
            set_replicas(state, rule, expert)
    d, s = rule.num_gpus, rule.num_slots
    for first in range(0, state.score.size, d):
        for k in range(s):
            for o in range(d):  # neighbouring columns one after the other, that the cache lines of all samples stay
                set_slot(state, rule, (first + o) * s + k)
    for gpu in range(state.score.size):
        gpus_of(state, rule, gpu)


@stage
def link_slots(state: State) -> None:
    """List the slots of each expert, ascending."""
    state.slots[:] = NO_SLOT
    for slot in range(state.phy2log.size - 1, -1, -1):
        expert = state.phy2log[slot]
        state.following[slot] = state.slots[expert]
        state.slots[expert] = slot


@stage
def set_replicas(state: State, rule: Rule, expert: int) -> None:
    """Fill what one replica of an expert carries."""
    loads, sums = state.replica[expert], state.sums[expert]
    sums[0], sums[1], sums[2] = replicas_of(state.samples[expert], state.counts[expert], rule.num_samples, loads)


@stage
def set_slot(state: State, rule: Rule, slot: int) -> None:
    """Fill what the replica in a slot brings to its position."""
    expert, at = state.phy2log[slot], state.position[slot]
    loads, mean = state.replica[expert], state.sums[expert, 0]
    state.mean[at], state.spread[at] = mean, state.sums[expert, 2]
    of_node = state.centred.shape[2]
    centred, q = state.centred[at // of_node], at % of_node
    for t in range(rule.num_samples):
        centred[t, q] = np.float32(rule.num_samples * loads[t] - mean)
    centred[rule.num_samples :, q] = 0


@stage
def gpus_of(state: State, rule: Rule, gpu: int) -> None:
    """Fill what a GPU carries, and what it carries without each of its replicas."""
    carried, s, steps = state.gpu_loads[gpu], rule.num_slots, np.float64(rule.num_samples)
    carried[:] = 0
    spread = 0.0
    for slot in range(gpu * s, (gpu + 1) * s):
        add_to(state.replica[state.phy2log[slot]], carried)
        spread += state.sums[state.phy2log[slot], 2]
    mean, square = sum_of(carried), sum_product(carried, carried)
    state.gpu_mean[gpu], state.gpu_square[gpu], state.gpu_spread[gpu] = mean, square, spread
    state.score[gpu] = scores(mean, square, spread, rule)
    least = np.inf
    for slot in range(gpu * s, (gpu + 1) * s):
        expert, at = state.phy2log[slot], state.position[slot]
        rest = mean - state.sums[expert, 0]
        product = sum_product(carried, state.replica[expert])
        variance = steps * (square - 2 * product + state.sums[expert, 1]) - rest * rest
        others = spread - state.sums[expert, 2]
        state.rest_mean[at], state.rest_twice[at] = rest, variance + others
        # Whatever comes instead, of spread u >= 0: 2 * covariance >= -2 * sqrt(variance * u) >= -variance / 2 - 2 * u.
        least = min(least, variance * 0.5 + others)
    state.gpu_least[gpu] = rule.z * np.sqrt(least * 0.5)


@stage
def scores(mean: float, square: float, spread: float, rule: Rule) -> float:
    """T times (mean + z standard deviations) of a GPU's load, cut: half of the covariance between experts counts."""
    twice = max(rule.num_samples * square - mean * mean + spread, 0.0)
    score: float = mean + np.floor(rule.z * np.sqrt(np.floor(twice * 0.5)))
    return score


@stage
def powers(score: float, top: float, norm: int) -> int:
    """(score / top)^norm in units of 2^-30; 2^46 for a score above `top`."""
    if score > top:
        return int(LIMIT)
    power: int = (np.int64(score) << SHIFT) // max(np.int64(top), np.int64(1))
    while norm > 1:
        power = (power * power) >> SHIFT
        norm >>= 1
    return power


@stage
def potential_of(state: State, rule: Rule) -> Potential:
    """The potential of a state; fill the power of each GPU."""
    heaviest = 0
    for gpu in range(state.score.size):
        heaviest = gpu if state.score[gpu] > state.score[heaviest] else heaviest
    top = state.score[heaviest]
    total = np.int64(0)
    for gpu in range(state.score.size):
        state.power[gpu] = powers(state.score[gpu], top, rule.norm)
        total += state.power[gpu]
    root = np.float64(total) / np.float64(state.score.size << SHIFT)
    norm = rule.norm
    while norm > 1:
        root = np.sqrt(root)
        norm >>= 1
    return Potential(heaviest, top, total, top * root)


@stage
def price_of_slot(price: float, num_samples: int, num_gpus: int) -> float:
    """`price`, a part of the mean GPU load, on the scale of the scores."""
    units: float = np.float64(num_samples * LOAD_UNITS) / np.float64(num_gpus)
    return price * units


@stage
def least_gain(price: float, potential: Potential, norm: int) -> int:
    """How far F must fall a written slot so that J falls by more than `price`."""
    gain = price * np.float64(norm) * np.float64(potential.sum) / potential.peak
    if not gain > 1:  # also where nothing has a load
        return 1
    floor: int = np.int64(min(gain, MOST_FLOOR))
    return floor


@stage
def predicted_peak(peak: float, num_samples: int, num_gpus: int) -> float:
    """J as a multiple of the mean GPU load."""
    multiple: float = peak * np.float64(num_gpus) / np.float64(num_samples * LOAD_UNITS)
    return multiple
