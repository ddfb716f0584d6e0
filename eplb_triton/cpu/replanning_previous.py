"""Replanning: whether a placement in force can be planned on, and experts for its empty slots."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Ints, flags, ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import State
from eplb_triton.cpu.replanning_sums import sum_of
from eplb_triton.replan_status import (
    EMPTY_ON_NODES,
    EXPERTS_MISSING,
    FINE,
    GROUP_SPLIT,
    GROUPS_UNEVEN,
    OUT_OF_RANGE,
)

NONE = np.int64(-1)


@stage
def previous_status(previous: Ints, num_experts: int, num_groups: int, num_nodes: int) -> int:
    """Why one layer of `previous` [P] cannot be planned on, the lowest of `replan_status`."""
    p, group_size = previous.size // num_nodes, num_experts // num_groups
    held, home = np.zeros(num_experts, np.bool_), np.full(num_groups, NONE)
    empty, missing, split = 0, num_experts, False
    for slot in range(previous.size):
        expert = previous[slot]
        if expert < -1 or expert >= num_experts:
            return OUT_OF_RANGE
        if expert == -1:
            empty += 1
            continue
        missing -= 0 if held[expert] else 1
        held[expert] = True
        group, node = expert // group_size, slot // p
        split = split or (home[group] != NONE and home[group] != node)
        home[group] = node
    if empty > 0 and num_nodes > 1:
        return EMPTY_ON_NODES
    if missing > empty:
        return EXPERTS_MISSING
    if split:
        return GROUP_SPLIT
    groups = np.zeros(num_nodes, np.int64)
    for group in range(num_groups):
        if home[group] != NONE:  # NONE where slots that are still empty are for all of it
            groups[home[group]] += 1
    for node in range(num_nodes):
        if num_nodes > 1 and groups[node] != num_groups // num_nodes:
            return GROUPS_UNEVEN
    return FINE


@stage
def fill_slots(state: State, num_slots: int) -> int:
    """Put an expert into every slot of -1 of a state's `phy2log`, slot after slot; how many there were.

    While an expert has no replica: the one of the largest load. Else the one of the largest load a replica, compared
    exactly, among those that the slot's GPU does not hold, or among all where it holds all. Ties: lowest expert.
    """
    phy2log, counts = state.phy2log, state.counts
    counts[:] = 0
    fills, missing = 0, 0
    for slot in range(phy2log.size):
        if phy2log[slot] == -1:
            fills += 1
        else:
            counts[phy2log[slot]] += 1
    if fills == 0:
        return 0
    loads = ints(counts.size)
    for expert in range(counts.size):
        loads[expert] = np.int64(sum_of(state.samples[expert]))
        missing += 1 if counts[expert] == 0 else 0
    held = flags(counts.size)
    for slot in range(phy2log.size):
        if phy2log[slot] != -1:
            continue
        held[:] = False
        distinct, first = 0, slot // num_slots * num_slots
        for other in range(first, first + num_slots):
            expert = phy2log[other]
            if expert != -1 and not held[expert]:
                held[expert] = True
                distinct += 1
        best = NONE
        for expert in range(counts.size):
            excluded = counts[expert] > 0 if missing > 0 else held[expert] and distinct < counts.size
            if not excluded and (best == NONE or _larger(loads, counts, expert, best)):
                best = expert
        missing -= 1 if counts[best] == 0 else 0
        counts[best] += 1
        phy2log[slot] = best
    return fills


@stage
def _larger(loads: Ints, counts: Ints, a: int, b: int) -> bool:
    """Whether a's load a replica is larger than b's; experts without a replica count as having one."""
    larger: bool = loads[a] * max(counts[b], 1) > loads[b] * max(counts[a], 1)
    return larger
