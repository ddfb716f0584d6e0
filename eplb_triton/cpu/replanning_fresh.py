"""Replanning: a plan from the samples alone."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Ints, divide, doubles, floats, ints, new_work
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.fixed import fixed_point
from eplb_triton.cpu.groups_partition import pack_partition
from eplb_triton.cpu.pack_blocks import fill_blocks
from eplb_triton.cpu.replanning_potential import Rule, State
from eplb_triton.cpu.replanning_sums import sum_of, sum_product
from eplb_triton.cpu.replicate_capped import capped_counts
from eplb_triton.cpu.replicate_waterfill import list_by_expert
from eplb_triton.cpu.tournament import new_trees


@stage
def fresh_plan(state: State, rule: Rule, previous: Ints, num_groups: int, table: Ints) -> None:
    """Fill `phy2log` of a state: counts, then blocks, of each expert's mean load and a part of its deviation.

    previous [P]: each node keeps the experts that it holds there; empty: groups are packed onto nodes by
    `pack_partition`, which takes `table`.
    """
    num_experts, d, s = state.counts.size, rule.num_gpus, rule.num_slots
    num_nodes, p = state.phy2log.size // (d * s), d * s
    node_of = ints(num_experts)
    if previous.size > 0:
        for k in range(previous.size):
            node_of[previous[k]] = k // p
    else:
        _fill_nodes(state, num_groups, num_nodes, table, node_of)
    e = num_experts // num_nodes
    experts, counts = ints(e), ints(e)
    expert, rank, gpu, slot = ints(p), ints(p), ints(p), ints(p)
    weights, loads, fixed = floats(e), floats(p), doubles(p)
    trees = new_trees(1, max(e, d))
    for node in range(num_nodes):
        n = 0
        for i in range(num_experts):
            if node_of[i] == node:
                experts[n], weights[n] = i, _weight(state, rule, i)
                n += 1
        capped_counts(weights, p, d, counts, trees)
        list_by_expert(counts, expert, rank)
        for k in range(p):
            loads[k] = divide(weights[expert[k]], counts[expert[k]])
        fixed_point(loads, s, fixed)
        fill_blocks(fixed, expert, d, gpu, slot)
        for k in range(p):
            state.phy2log[(node * d + gpu[k]) * s + slot[k]] = experts[expert[k]]


@stage
def _weight(state: State, rule: Rule, expert: int) -> np.float32:
    """T times (mean + z / sqrt(S) deviations), at least 1: S replicas of independent loads deviate by sqrt(S) of them
    together."""
    samples = state.samples[expert]
    total = sum_of(samples)
    twice = max(rule.num_samples * sum_product(samples, samples) - total * total, 0.0)
    deviations = rule.z / np.sqrt(np.float64(rule.num_slots))
    weight: np.float32 = np.float32(max(total + deviations * np.sqrt(twice), 1.0))
    return weight


@stage
def _fill_nodes(state: State, num_groups: int, num_nodes: int, table: Ints, node_of: Ints) -> None:
    """Fill the node of each expert: groups packed by their loads."""
    group_size = node_of.size // num_groups
    loads = floats(num_groups)
    for group in range(num_groups):
        total = 0.0
        for i in range(group * group_size, (group + 1) * group_size):
            total += sum_of(state.samples[i])
        loads[group] = np.float32(total)
    node, at = ints(num_groups), ints(num_groups)
    work, trees = new_work(num_groups, num_nodes), new_trees(1, num_nodes)
    pack_partition(loads, num_nodes, node, at, table, work, trees[0])
    for i in range(node_of.size):
        node_of[i] = node[i // group_size]
