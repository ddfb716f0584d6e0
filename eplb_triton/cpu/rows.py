"""The stages of a row as a policy chooses them. A row is a layer, or one node of it.

The fields reach a stage as constants of its closure: Numba drops a branch on a constant before it compiles what the
branch calls, so that `deepseek` never waits for the stages of other policies. The fields are int64, as Numba would
take a Python int for another type in each function that it is handed to.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eplb_triton.cpu.arith import Doubles, Floats, Ints, divide, doubles, floats, int_rows, ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.fields import (
    COUNTS_CAPPED,
    COUNTS_GATED,
    COUNTS_PEAK_AWARE,
    COUNTS_WATERFILL,
    GROUP_PARTITION,
    MEAN_COUNTS,
    PACK_BLOCKS,
    PACK_SPREAD,
    REFINE_CORNER,
    REFINE_EXCHANGE,
    REFINE_NEAREST,
    REFINE_PEAK,
    Fields,
)
from eplb_triton.cpu.fixed import fixed_point, node_target
from eplb_triton.cpu.fixup import move_replicas
from eplb_triton.cpu.fixup_paired import move_paired
from eplb_triton.cpu.groups import group_loads, list_experts
from eplb_triton.cpu.groups_partition import pack_partition
from eplb_triton.cpu.pack import pack_plain, pack_spread
from eplb_triton.cpu.pack_blocks import fill_blocks
from eplb_triton.cpu.refine import corner_gpu_steps, refine_corner, refine_nearest, refine_peak
from eplb_triton.cpu.refine_exchange import refine_doubles, refine_match, refine_pairs
from eplb_triton.cpu.replicate import fixed_tail, pick_dhondt, pick_gated, pick_peak_aware, pick_sainte_lague
from eplb_triton.cpu.replicate_capped import capped_counts
from eplb_triton.cpu.replicate_waterfill import list_by_expert, waterfill_counts


def group_stage(fields: Fields) -> Callable[..., None]:
    """The stage that lists the experts of a layer node by node."""
    pack, refine = fields.group_pack, fields.group_refine
    steps, lights = np.int64(fields.group_steps), np.int64(fields.group_lights)

    @stage
    def place_groups(
        loads: Floats,  # [E]
        num_groups: int,
        num_nodes: int,
        table: Ints,  # [partitions, G], or empty: see pack_partition
        work: Ints,
        trees: Ints,
        experts: Ints,  # [E], filled
    ) -> None:
        group_size = loads.size // num_groups
        loads_of_groups, node, position = floats(num_groups), ints(num_groups), ints(num_groups)
        group_loads(loads, group_size, loads_of_groups)
        if pack == GROUP_PARTITION:
            pack_partition(loads_of_groups, num_nodes, node, position, table, work, trees[0])
        else:
            pack_plain(loads_of_groups, num_nodes, node, position, work, trees[0])
        if refine == REFINE_NEAREST:
            refine_nearest(loads_of_groups, node, position, num_nodes, steps, lights, work, doubles(num_nodes))
        if refine == REFINE_CORNER:
            refine_corner(loads_of_groups, node, position, num_nodes, steps, work, doubles(num_nodes))
        list_experts(node, position, group_size, num_nodes, experts)

    return place_groups


def count_stage(fields: Fields) -> Callable[..., None]:
    """The stage that gives the counts of a row and its replica list, fixed up."""
    rule = fields.counts
    mean_length, fixed_length = rule in MEAN_COUNTS, rule in (COUNTS_PEAK_AWARE, COUNTS_GATED)
    moves, donors, peak, tie = map(np.int64, (fields.moves, fields.donors, fields.peak, fields.tie))
    paired_moves, paired_donors = np.int64(fields.paired_moves), np.int64(fields.paired_donors)

    @stage
    def count_replicas(
        loads: Floats,  # [e]
        num_gpus: int,
        mean_tail_length: int,  # of compiled_mean_length, 0 for the other rules
        counts: Ints,  # [e], filled
        expert: Ints,  # [p], filled: of each replica
        rank: Ints,  # [p], filled
        work: Ints,
        trees: Ints,
    ) -> None:
        e, p = loads.size, expert.size
        if rule == COUNTS_WATERFILL:
            waterfill_counts(loads, p, counts, trees)
            if moves > 0:
                no_list = expert[:0]
                move_replicas(loads, counts, no_list, no_list, moves, donors, peak, tie, floats(e))
            list_by_expert(counts, expert, rank)
        elif rule == COUNTS_CAPPED:
            capped_counts(loads, p, num_gpus, counts, trees)
            if paired_moves > 0 and p == 2 * num_gpus:
                move_paired(loads, counts, num_gpus, paired_moves, paired_donors, work)
            list_by_expert(counts, expert, rank)
        else:
            _list_once(counts, expert, rank)
            bulk = p - mean_tail_length
            if fixed_length and p > e:
                bulk = p - fixed_tail(p - e)
            pick_dhondt(loads, counts, expert, rank, e, bulk, trees)
            if mean_length:
                pick_sainte_lague(loads, counts, expert, rank, bulk, p, trees)
            if rule == COUNTS_PEAK_AWARE:
                pick_peak_aware(loads, counts, expert, rank, bulk, p, trees)
            if rule == COUNTS_GATED:
                pick_gated(loads, counts, expert, rank, bulk, p, trees)
            if moves > 0 and p > e:
                move_replicas(loads, counts, expert, rank, moves, donors, peak, tie, floats(e))

    return count_replicas


def pack_stage(fields: Fields) -> Callable[..., float]:
    """The stage that packs the replicas of a row onto its GPUs.

    It returns the load that the heaviest GPU need not go below, in fixed point; 0 where the packing has none.
    """
    rule = fields.gpu_pack

    @stage
    def pack_replicas(
        replica_loads: Floats,  # [p]
        expert: Ints,  # [p]
        num_experts: int,
        num_gpus: int,
        loads_of_nodes: Doubles,  # [N], of node_loads: what sets the target
        node_scale: int,
        gpu: Ints,  # [p], filled
        slot: Ints,  # [p], filled
        fixed: Doubles,  # [p], filled by `blocks`
        work: Ints,
        trees: Ints,
    ) -> float:
        p, target = expert.size, 0.0
        if rule == PACK_BLOCKS:
            scale = fixed_point(replica_loads, p // num_gpus, fixed)
            fill_blocks(fixed, expert, num_gpus, gpu, slot)
            target = node_target(loads_of_nodes, node_scale, fixed, scale, num_gpus)
        elif rule == PACK_SPREAD and num_gpus > 1 and p > num_experts:
            held = int_rows(num_experts, num_gpus)
            held[:] = 0
            pack_spread(replica_loads, expert, num_gpus, gpu, slot, work, trees[0], held, floats(num_gpus))
        else:
            pack_plain(replica_loads, num_gpus, gpu, slot, work, trees[0])
        return target

    return pack_replicas


def refine_stage(fields: Fields) -> Callable[..., None]:
    """The stage that swaps replicas between the GPUs of a row."""
    rule, steps, lights = fields.gpu_refine, np.int64(fields.gpu_steps), np.int64(fields.gpu_lights)
    pair_rounds, match_rounds = np.int64(fields.pair_rounds), np.int64(fields.match_rounds)
    proposers, double_steps = np.int64(fields.proposers), np.int64(fields.double_steps)
    candidates = np.int64(fields.candidates)

    @stage
    def refine_gpus(
        replica_loads: Floats,  # [p]
        expert: Ints,  # [p]
        num_gpus: int,
        target: float,  # of the packing
        fixed: Doubles,  # [p]
        gpu: Ints,  # [p], changed
        slot: Ints,  # [p], changed
        work: Ints,
    ) -> None:
        if rule == REFINE_NEAREST:
            refine_nearest(replica_loads, gpu, slot, num_gpus, steps, lights, work, doubles(num_gpus))
        if rule == REFINE_CORNER:
            pack_loads = doubles(num_gpus)
            gpu_steps = corner_gpu_steps(replica_loads, gpu, slot, num_gpus, steps, work, pack_loads)
            refine_corner(replica_loads, gpu, slot, num_gpus, gpu_steps, work, pack_loads)
        if rule == REFINE_PEAK:
            refine_peak(replica_loads, expert, gpu, slot, num_gpus, work, doubles(num_gpus))
        if rule == REFINE_EXCHANGE:
            refine_pairs(fixed, expert, gpu, slot, num_gpus, target, pair_rounds)
            refine_match(fixed, expert, gpu, slot, num_gpus, target, match_rounds, proposers)
            refine_doubles(fixed, expert, gpu, slot, num_gpus, target, double_steps, candidates)

    return refine_gpus


@stage
def load_row(loads: Floats, experts: Ints, row_loads: Floats) -> None:
    """The loads of the row's experts."""
    for i in range(experts.size):
        row_loads[i] = loads[experts[i]]


@stage
def divide_loads(loads: Floats, counts: Ints, expert: Ints, replica_loads: Floats) -> None:
    """The load of each replica of the list."""
    for k in range(expert.size):
        replica_loads[k] = divide(loads[expert[k]], counts[expert[k]])


@stage
def _list_once(counts: Ints, expert: Ints, rank: Ints) -> None:
    """Begin the replica list: every expert once."""
    for i in range(counts.size):
        counts[i] = 1
        expert[i] = i
        rank[i] = 0
