"""The order of the stages: entry points, each compiled for the fields of a policy that it branches on.

The fields reach an entry point as constants of its closure: Numba drops a branch on a constant before it compiles
what the branch calls, so that `deepseek` never waits for the stages of other policies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from eplb_triton.cpu.arith import Floats, Ints, doubles, floats, int_rows, ints, new_work, quotient
from eplb_triton.cpu.compiled import entry_point, stage
from eplb_triton.cpu.fields import (
    COUNTS_CAPPED,
    COUNTS_DISPERSION,
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
    REFINE_NONE,
    REFINE_PEAK,
    Fields,
    name_of,
)
from eplb_triton.cpu.fixed import fixed_point, node_target
from eplb_triton.cpu.fixup import move_replicas
from eplb_triton.cpu.fixup_paired import move_paired
from eplb_triton.cpu.groups import group_loads, list_experts, node_loads
from eplb_triton.cpu.groups_partition import pack_partition
from eplb_triton.cpu.maps import physical_maps
from eplb_triton.cpu.pack import pack_plain, pack_spread
from eplb_triton.cpu.pack_blocks import fill_blocks
from eplb_triton.cpu.refine import corner_gpu_steps, refine_corner, refine_nearest, refine_peak
from eplb_triton.cpu.refine_exchange import refine_doubles, refine_match, refine_pairs
from eplb_triton.cpu.replicate import (
    dispersion_tail,
    fixed_tail,
    pick_dhondt,
    pick_gated,
    pick_peak_aware,
    pick_sainte_lague,
    simulated_tail,
)
from eplb_triton.cpu.replicate_capped import capped_counts
from eplb_triton.cpu.replicate_waterfill import list_by_expert, waterfill_counts
from eplb_triton.cpu.tournament import new_trees

TREES = np.int64(3)  # an int64, as in tournament.py
TOO_MANY = -2  # in `bad`: an expert of the row has more replicas than log2phy is wide


@cache
def compiled_mean_length(counts: int) -> Callable[..., int]:
    """The entry point that gives the length of a tail with a mean over all rows."""

    def tail_length(
        weights: Floats,  # [rows, e]
        num_redundant: int,
    ) -> int:
        if counts == COUNTS_DISPERSION:
            return dispersion_tail(weights, num_redundant)
        return simulated_tail(weights, num_redundant)

    return entry_point(tail_length, "int64(float32[:, ::1], int64)", str(counts))


@cache
def compiled_log2phy(dtype: str) -> Callable[..., None]:
    """The entry point that lists the slots of each expert, in maps of "int64" or "int32"."""

    def fill_log2phy(
        phy2log: Ints,  # [L, P]
        phyrank: Ints,  # [L, P]
        log2phy: Ints,  # [L, E, width], filled; what does not fit is left out, the rest is -1
        bad: Ints,  # [L, N] int32, TOO_MANY where something was left out
        first: int,  # layers first .. last-1
        last: int,
    ) -> None:
        num_experts, width = log2phy.shape[1:]
        slots_per_node = phy2log.shape[1] // bad.shape[1]
        for layer in range(first, last):
            for expert in range(num_experts):
                for rank in range(width):
                    log2phy[layer, expert, rank] = -1
            for slot in range(phy2log.shape[1]):
                if phyrank[layer, slot] < width:
                    log2phy[layer, phy2log[layer, slot], phyrank[layer, slot]] = slot
                else:
                    bad[layer, slot // slots_per_node] = TOO_MANY

    signature = f"void(int64[:, ::1], int64[:, ::1], {dtype}[:, :, :], int32[:, :], int64, int64)"
    return entry_point(fill_log2phy, signature, dtype)


@stage
def _list_once(counts: Ints, expert: Ints, rank: Ints) -> None:
    """Begin the replica list: every expert once."""
    for i in range(counts.size):
        counts[i] = 1
        expert[i] = i
        rank[i] = 0


@cache
def compiled_rows(fields: Fields) -> Callable[..., None]:  # noqa: PLR0915 - as plan_rows
    """The entry point that plans layers: their groups onto nodes, then each row.

    A tail with a mean over all rows stands between the two, and then each takes a call of its own.
    """
    tail, moves, donors, peak, tie, group_rule, group_steps, group_lights, *others = map(np.int64, fields)
    pack_rule, refine, steps, lights, group_pack, paired_moves, paired_donors, *exchange = others
    pair_rounds, match_rounds, proposers, double_steps, candidates = exchange
    spread = bool(pack_rule == PACK_SPREAD)
    swaps = fields.group_refine != REFINE_NONE or fields.gpu_refine in (REFINE_NEAREST, REFINE_CORNER, REFINE_PEAK)
    mean_length, fixed_length = fields.counts in MEAN_COUNTS, fields.counts in (COUNTS_PEAK_AWARE, COUNTS_GATED)

    def plan_rows(  # noqa: PLR0912, PLR0915 - one line a stage; a policy's code has three of these branches
        weight: Floats,  # [L, E]
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_gpus: int,
        table: Ints,  # [partitions, G], or empty: see pack_partition
        place: bool,  # whether to fill `experts`, or to read it
        plan: bool,  # whether to fill the maps
        mean_tail_length: int,  # of compiled_mean_length, 0 for the other rules
        kept: Ints,  # [L, E], the experts of each layer node by node; [0, E]: not kept from one call to the next
        phy2log: Ints,  # [L, P], filled
        phyrank: Ints,  # [L, P], filled
        logcnt: Ints,  # [L, E], filled
        first: int,  # layers first .. last-1
        last: int,
    ) -> None:
        group_size = weight.shape[1] // num_groups
        loads_of_groups, node, position = floats(num_groups), ints(num_groups), ints(num_groups)
        own = ints(weight.shape[1])
        e, p, d = weight.shape[1] // num_nodes, num_replicas // num_nodes, num_gpus // num_nodes
        # sums are bounds, too, and a `max` out here would be compiled for this function alone
        work, trees = new_work(p + num_groups, d + num_nodes), new_trees(TREES, e + d + num_nodes)
        if swaps:
            totals = doubles(d + num_nodes)
        if moves > 0:
            replica_loads, no_list = floats(e), ints(p)[:0]
        if spread:
            held, pack_loads = int_rows(e, d), floats(d)
            held[:] = 0
        if pack_rule == PACK_BLOCKS:
            fixed, loads_of_nodes, node_scale, target = doubles(p), doubles(num_nodes), np.int64(0), 0.0
            loads_of_nodes[:] = 0
        weights, counts = floats(e), ints(e)
        expert, rank = ints(p), ints(p)
        loads, pack, slot = floats(p), ints(p), ints(p)
        tail_length = mean_tail_length
        if fixed_length and p > e:
            tail_length = fixed_tail(p - e)
        for layer in range(first, last):
            experts = kept[layer] if kept.shape[0] > 0 else own
            if place:
                group_loads(weight[layer], group_size, loads_of_groups)
                if group_pack == GROUP_PARTITION:
                    pack_partition(loads_of_groups, num_nodes, node, position, table, work, trees[0])
                else:
                    pack_plain(loads_of_groups, num_nodes, node, position, work, trees[0])
                if group_rule == REFINE_NEAREST:
                    refine_nearest(
                        loads_of_groups, node, position, num_nodes, group_steps, group_lights, work, totals[:num_nodes]
                    )
                if group_rule == REFINE_CORNER:
                    refine_corner(loads_of_groups, node, position, num_nodes, group_steps, work, totals[:num_nodes])
                list_experts(node, position, group_size, num_nodes, experts)
            if not plan:
                continue
            if pack_rule == PACK_BLOCKS and num_nodes > 1:
                node_scale = node_loads(weight[layer], experts, num_groups, loads_of_nodes)
            for nth in range(num_nodes):
                row = experts[nth * e : (nth + 1) * e]
                for i in range(e):
                    weights[i] = weight[layer, row[i]]
                if tail == COUNTS_WATERFILL:
                    waterfill_counts(weights, p, counts, trees)
                    if moves > 0:
                        move_replicas(weights, counts, no_list, no_list, moves, donors, peak, tie, replica_loads)
                    list_by_expert(counts, expert, rank)
                elif tail == COUNTS_CAPPED:
                    capped_counts(weights, p, d, counts, trees)
                    if paired_moves > 0 and p == 2 * d:
                        move_paired(weights, counts, d, paired_moves, paired_donors, work)
                    list_by_expert(counts, expert, rank)
                else:
                    _list_once(counts, expert, rank)
                    pick_dhondt(weights, counts, expert, rank, e, p - tail_length, trees)
                    if mean_length:
                        pick_sainte_lague(weights, counts, expert, rank, p - tail_length, p, trees)
                    if tail == COUNTS_PEAK_AWARE:
                        pick_peak_aware(weights, counts, expert, rank, p - tail_length, p, trees)
                    if tail == COUNTS_GATED:
                        pick_gated(weights, counts, expert, rank, p - tail_length, p, trees)
                    if moves > 0 and p > e:
                        move_replicas(weights, counts, expert, rank, moves, donors, peak, tie, replica_loads)
                for k in range(p):
                    loads[k] = quotient(weights[expert[k]], counts[expert[k]])
                if pack_rule == PACK_BLOCKS:
                    scale = fixed_point(loads, p // d, fixed)
                    fill_blocks(fixed, expert, d, pack, slot)
                    target = node_target(loads_of_nodes, node_scale, fixed, scale, d)
                elif spread and d > 1 and p > e:
                    pack_spread(loads, expert, d, pack, slot, work, trees[0], held, pack_loads)
                else:
                    pack_plain(loads, d, pack, slot, work, trees[0])
                if refine == REFINE_NEAREST:
                    refine_nearest(loads, pack, slot, d, steps, lights, work, totals)
                if refine == REFINE_CORNER:
                    gpu_steps = corner_gpu_steps(loads, pack, slot, d, steps, work, totals)
                    refine_corner(loads, pack, slot, d, gpu_steps, work, totals)
                if refine == REFINE_PEAK:
                    refine_peak(loads, expert, pack, slot, d, work, totals)
                if refine == REFINE_EXCHANGE:
                    refine_pairs(fixed, expert, pack, slot, d, target, pair_rounds)
                    refine_match(fixed, expert, pack, slot, d, target, match_rounds, proposers)
                    refine_doubles(fixed, expert, pack, slot, d, target, double_steps, candidates)
                physical_maps(
                    pack, slot, expert, rank, counts, row, d, nth, phy2log[layer], phyrank[layer], logcnt[layer]
                )

    sizes, maps = "int64, int64, int64, int64", "int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1]"
    signature = f"void(float32[:, ::1], {sizes}, int64[:, ::1], boolean, boolean, int64, {maps}, int64, int64)"
    seconds = 8 if fields.gpu_refine == REFINE_EXCHANGE else 4
    about = f"{name_of(fields)}, about {seconds} s"
    return entry_point(plan_rows, signature, "-".join(map(str, fields)), about)
