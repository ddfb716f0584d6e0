"""The order of the stages: entry points, each compiled for the fields of a policy that its stages branch on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from eplb_triton.cpu.arith import Floats, Ints, doubles, floats, ints, new_work
from eplb_triton.cpu.compiled import entry_point
from eplb_triton.cpu.fields import COUNTS_DISPERSION, PACK_BLOCKS, REFINE_EXCHANGE, Fields, name_of
from eplb_triton.cpu.groups import node_loads
from eplb_triton.cpu.maps import physical_maps
from eplb_triton.cpu.replicate import dispersion_tail, simulated_tail
from eplb_triton.cpu.rows import count_stage, divide_loads, group_stage, load_row, pack_stage, refine_stage
from eplb_triton.cpu.tournament import new_trees

TREES = np.int64(3)  # an int64, as in tournament.py
_SIZES, _MAPS = "int64, int64, int64, int64", "int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1]"
SIGNATURE = f"void(float32[:, ::1], {_SIZES}, int64[:, ::1], boolean, boolean, int64, {_MAPS}, int64, int64)"
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


@cache
def compiled_rows(fields: Fields) -> Callable[..., None]:
    """The entry point that plans layers: their groups onto nodes, then each row.

    A tail with a mean over all rows stands between the two, and then each takes a call of its own.
    """
    place_groups, count_replicas = group_stage(fields), count_stage(fields)
    pack_replicas, refine_gpus = pack_stage(fields), refine_stage(fields)
    wants_nodes = bool(fields.gpu_pack == PACK_BLOCKS)

    def plan_rows(
        layers: Floats,  # [L, E], loads
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
        e, p, d = layers.shape[1] // num_nodes, num_replicas // num_nodes, num_gpus // num_nodes
        # sums are bounds, too, and a `max` out here would be compiled for this function alone
        work, trees = new_work(p + num_groups, d + num_nodes), new_trees(TREES, e + d + num_nodes)
        own, loads, counts = ints(layers.shape[1]), floats(e), ints(e)
        expert, rank, replica_loads = ints(p), ints(p), floats(p)
        gpu, slot, fixed = ints(p), ints(p), doubles(p)
        loads_of_nodes, node_scale = doubles(num_nodes), np.int64(0)
        loads_of_nodes[:] = 0
        for layer in range(first, last):
            experts = kept[layer] if kept.shape[0] > 0 else own
            if place:
                place_groups(layers[layer], num_groups, num_nodes, table, work, trees, experts)
            if not plan:
                continue
            if wants_nodes and num_nodes > 1:
                node_scale = node_loads(layers[layer], experts, num_groups, loads_of_nodes)
            for node in range(num_nodes):
                row = experts[node * e : (node + 1) * e]
                load_row(layers[layer], row, loads)
                count_replicas(loads, d, mean_tail_length, counts, expert, rank, work, trees)
                divide_loads(loads, counts, expert, replica_loads)
                target = pack_replicas(
                    replica_loads, expert, e, d, loads_of_nodes, node_scale, gpu, slot, fixed, work, trees
                )
                refine_gpus(replica_loads, expert, d, target, fixed, gpu, slot, work)
                physical_maps(
                    gpu, slot, expert, rank, counts, row, d, node, phy2log[layer], phyrank[layer], logcnt[layer]
                )

    seconds = 8 if fields.gpu_refine == REFINE_EXCHANGE else 4
    about = f"{name_of(fields)}, about {seconds} s"
    return entry_point(plan_rows, SIGNATURE, "-".join(map(str, fields)), about)
