"""The fused kernel: one program plans one row, a layer or one node of it, from loads to maps.

After the group stage the nodes of a layer never meet again, so each program repeats the (small) group stage of its
layer and then works alone. The two tail rules with a mean over all rows of the call read what measure.py left.
"""
# ruff: noqa: E501, N803, N806, PLR0915, PLR1714, PLR1716, RET505
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import divide
from eplb_triton.kernels.fixed import fixed_point, mean_target, node_target
from eplb_triton.kernels.fixup import move_replicas
from eplb_triton.kernels.fixup_paired import move_paired
from eplb_triton.kernels.groups import groups_to_nodes, load_row
from eplb_triton.kernels.maps import physical_maps
from eplb_triton.kernels.pack import pack_plain, pack_spread
from eplb_triton.kernels.pack_blocks import fill_blocks
from eplb_triton.kernels.positions import MARKS, new_state
from eplb_triton.kernels.refine import corner_gpu_steps, refine_corner, refine_nearest, refine_peak
from eplb_triton.kernels.refine_exchange import refine_doubles, refine_match, refine_pairs
from eplb_triton.kernels.replicate import (
    dispersion_tail,
    fixed_tail,
    pick_dhondt,
    pick_gated,
    pick_peak_aware,
    pick_sainte_lague,
    simulated_tail,
)
from eplb_triton.kernels.replicate_capped import capped_counts
from eplb_triton.kernels.replicate_waterfill import list_by_expert, waterfill_counts


@triton.jit(do_not_specialize=["layer_stride", "num_rows"])
def plan_rows(
    weight_ptr,  # any real dtype [L, E], tokens per expert
    layer_stride,
    expert_stride,
    num_rows,  # L * N
    statistics_ptr,  # float64 [3, L * N], from measure_rows; not read where the tail rule needs none
    floats_ptr,  # float32 [L * N, 3, SCRATCH], scratch
    ints_ptr,  # int32 [L * N, 6, SCRATCH], scratch
    longs_ptr,  # int64 [L * N, SCRATCH], scratch
    doubles_ptr,  # float64 [L * N, SCRATCH], scratch
    partitions_ptr,  # int32 [WAYS, G], ways to split the groups; not read where there are none
    phy2log_ptr,  # integer [L, P], out
    phyrank_ptr,  # integer [L, P], out
    logcnt_ptr,  # integer [L, E], out
    log2phy_ptr,  # integer [L, E, P - E + 1], out; None: not wanted
    bad_ptr,  # int32 [L, N], out: lowest expert of the row with a bad load, else -1
    NUM_EXPERTS: tl.constexpr,
    NUM_REPLICAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    NUM_GPUS: tl.constexpr,
    EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
    GROUPS: tl.constexpr,
    NODES: tl.constexpr,
    GPUS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    PICKS: tl.constexpr,
    SCRATCH: tl.constexpr,
    IN_ROUNDS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TAIL: tl.constexpr,
    FIXUP_MOVES: tl.constexpr,
    FIXUP_DONORS: tl.constexpr,
    FIXUP_PEAK: tl.constexpr,
    FIXUP_TIE: tl.constexpr,
    GROUP_RULE: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    GROUP_LIGHTS: tl.constexpr,
    GPU_PACK: tl.constexpr,
    GPU_RULE: tl.constexpr,
    GPU_STEPS: tl.constexpr,
    GPU_LIGHTS: tl.constexpr,
    GROUP_PACK: tl.constexpr,
    WAYS: tl.constexpr,
    WAY_LANES: tl.constexpr,
    GROUP_PROPOSERS: tl.constexpr,
    GROUP_MEETINGS: tl.constexpr,
    PAIRED_MOVES: tl.constexpr,
    PAIRED_DONORS: tl.constexpr,
    PAIR_ROUNDS: tl.constexpr,
    MATCH_ROUNDS: tl.constexpr,
    PROPOSERS: tl.constexpr,
    MEETINGS: tl.constexpr,
    DOUBLE_STEPS: tl.constexpr,
    PARTNERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    row = layer * NUM_NODES + node
    e: tl.constexpr = NUM_EXPERTS // NUM_NODES
    p: tl.constexpr = NUM_REPLICAS // NUM_NODES
    d: tl.constexpr = NUM_GPUS // NUM_NODES
    layer_ptr = weight_ptr + layer * layer_stride
    weights_ptr = floats_ptr + row * (3 * SCRATCH)
    average_ptr = weights_ptr + SCRATCH
    loads_ptr = weights_ptr + 2 * SCRATCH
    sorted_ptr = longs_ptr + row * SCRATCH
    logical_ptr = ints_ptr + row * (12 * SCRATCH)
    expert_ptr = logical_ptr + SCRATCH
    rank_ptr = logical_ptr + 2 * SCRATCH
    item_at_ptr = logical_ptr + 3 * SCRATCH
    counts_ptr = logical_ptr + 4 * SCRATCH
    spare_ptr = logical_ptr + 5 * SCRATCH
    fixed_ptr = logical_ptr + 6 * SCRATCH
    state_ptr = logical_ptr + 7 * SCRATCH  # of 5 arrays
    held_ptr = doubles_ptr + row * SCRATCH

    heaviest_node, node_scale = groups_to_nodes(
        layer_ptr, expert_stride, node, logical_ptr, loads_ptr, item_at_ptr, sorted_ptr, held_ptr,
        partitions_ptr, fixed_ptr, state_ptr,
        NUM_EXPERTS, NUM_GROUPS, NUM_NODES, EXPERTS, GROUPS, NODES, GROUP_SLOTS, GROUP_RULE, GROUP_STEPS, GROUP_LIGHTS,
        GROUP_PACK, GPU_RULE == "exchange" and NUM_NODES > 1, WAYS, WAY_LANES, GROUP_PROPOSERS, GROUP_MEETINGS,
    )  # fmt: skip
    load_row(layer_ptr, expert_stride, logical_ptr, weights_ptr, bad_ptr + row, e, EXPERTS)
    counts = _replicate(
        weights_ptr, expert_ptr, rank_ptr, average_ptr, spare_ptr, sorted_ptr, statistics_ptr, num_rows,
        TAIL, FIXUP_MOVES, FIXUP_DONORS, FIXUP_PEAK, FIXUP_TIE, PAIRED_MOVES, PAIRED_DONORS,
        e, p, d, EXPERTS, REPLICAS, PICKS, AT_ONCE,
    )  # fmt: skip
    _replica_loads(weights_ptr, counts, counts_ptr, expert_ptr, average_ptr, loads_ptr, e, p, EXPERTS, REPLICAS)
    if GPU_PACK == "blocks":
        scale = fixed_point(loads_ptr, fixed_ptr, p // d, p, REPLICAS)
        fill_blocks(fixed_ptr, expert_ptr, item_at_ptr, sorted_ptr, spare_ptr, p, d, REPLICAS, GPUS)
    elif GPU_PACK == "spread" and p > e:  # without redundant replicas there is nothing to spread
        pack_spread(loads_ptr, expert_ptr, item_at_ptr, sorted_ptr, spare_ptr, p, d, REPLICAS, GPUS)
    else:
        pack_plain(loads_ptr, item_at_ptr, sorted_ptr, p, d, REPLICAS, GPUS, IN_ROUNDS)
    if GPU_RULE == "nearest":
        refine_nearest(loads_ptr, item_at_ptr, d, GPU_STEPS, GPU_LIGHTS, p, GPUS)
    if GPU_RULE == "corner" and p > d:
        steps = corner_gpu_steps(loads_ptr, item_at_ptr, held_ptr, d, GPU_STEPS, p, GPUS)
        refine_corner(loads_ptr, item_at_ptr, held_ptr, d, steps, p, GPUS, SLOTS)
    if GPU_RULE == "peak":
        refine_peak(loads_ptr, expert_ptr, item_at_ptr, d, p, GPUS, SLOTS)
    if GPU_RULE == "exchange":
        MARKED: tl.constexpr = p - e <= MARKS
        load_at, label_at, order = state_ptr, state_ptr + SCRATCH, state_ptr + 2 * SCRATCH
        height, spare = state_ptr + 3 * SCRATCH, state_ptr + 4 * SCRATCH
        if NUM_NODES > 1:
            target = node_target(heaviest_node, node_scale, fixed_ptr, scale, d, p, REPLICAS)
        else:
            target = mean_target(fixed_ptr, d, p, REPLICAS)
        new_state(
            fixed_ptr, expert_ptr, counts_ptr, item_at_ptr, load_at, label_at, spare_ptr, e, EXPERTS, p, REPLICAS, MARKED
        )  # fmt: skip
        refine_pairs(
            item_at_ptr, load_at, label_at, order, height, spare, d, target, PAIR_ROUNDS, p, GPUS, MARKED
        )  # fmt: skip
        refine_match(
            item_at_ptr, load_at, label_at, order, height, spare, d, target, MATCH_ROUNDS, PROPOSERS, p, GPUS, MEETINGS,
            MARKED,
        )  # fmt: skip
        refine_doubles(
            item_at_ptr, load_at, label_at, order, height, spare, d, target, DOUBLE_STEPS, PARTNERS, p, GPUS, CANDIDATES,
            MARKED,
        )  # fmt: skip
    if log2phy_ptr is not None:
        log2phy_ptr += layer * (NUM_EXPERTS * (NUM_REPLICAS - NUM_EXPERTS + 1))
    physical_maps(
        item_at_ptr, expert_ptr, rank_ptr, counts_ptr, logical_ptr, node * p,
        phy2log_ptr + layer * NUM_REPLICAS, phyrank_ptr + layer * NUM_REPLICAS, logcnt_ptr + layer * NUM_EXPERTS,
        log2phy_ptr, e, p, NUM_REPLICAS - NUM_EXPERTS + 1, EXPERTS, REPLICAS, RANKS,
    )  # fmt: skip


@triton.jit
def _replicate(
    weights_ptr,
    expert_ptr,
    rank_ptr,
    average_ptr,
    spare_ptr,
    sorted_ptr,
    statistics_ptr,
    num_rows,
    TAIL: tl.constexpr,
    FIXUP_MOVES: tl.constexpr,
    FIXUP_DONORS: tl.constexpr,
    FIXUP_PEAK: tl.constexpr,
    FIXUP_TIE: tl.constexpr,
    PAIRED_MOVES: tl.constexpr,
    PAIRED_DONORS: tl.constexpr,
    e: tl.constexpr,
    p: tl.constexpr,
    d: tl.constexpr,
    EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
    PICKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Counts [EXPERTS] of the row, and its replica list in memory, fixed up."""
    FIX: tl.constexpr = FIXUP_MOVES > 0 and p > e and e > 1
    if TAIL == "waterfill":
        counts = waterfill_counts(weights_ptr, p, e, EXPERTS)
        if FIX:
            counts = move_replicas(
                weights_ptr, counts, None, None, FIXUP_MOVES, FIXUP_DONORS, FIXUP_PEAK, FIXUP_TIE, e, p, EXPERTS, REPLICAS
            )  # fmt: skip
        list_by_expert(counts, expert_ptr, rank_ptr, spare_ptr, p, e, EXPERTS, REPLICAS)
    elif TAIL == "capped":
        counts = capped_counts(weights_ptr, spare_ptr if AT_ONCE else None, p, d, e, EXPERTS)
        if PAIRED_MOVES > 0 and p == 2 * d:
            counts = move_paired(
                weights_ptr, counts, d, PAIRED_MOVES, PAIRED_DONORS, average_ptr, spare_ptr, sorted_ptr, e, EXPERTS, REPLICAS
            )  # fmt: skip
        list_by_expert(counts, expert_ptr, rank_ptr, spare_ptr, p, e, EXPERTS, REPLICAS)
    else:
        expert = tl.arange(0, EXPERTS)
        tl.store(expert_ptr + expert, expert, mask=expert < e)
        tl.store(rank_ptr + expert, tl.zeros_like(expert), mask=expert < e)
        counts = tl.zeros((EXPERTS,), tl.int32) + 1
        if p > e:
            tail = _tail_length(statistics_ptr, num_rows, TAIL, p - e)
            offsets_ptr = spare_ptr if AT_ONCE else None
            counts = pick_dhondt(
                weights_ptr, counts, expert_ptr, rank_ptr, e, p - tail, offsets_ptr, e, EXPERTS, PICKS
            )  # fmt: skip
            if TAIL == "dispersion" or TAIL == "simulated":
                counts = pick_sainte_lague(weights_ptr, counts, expert_ptr, rank_ptr, p - tail, p, e, EXPERTS)
            elif TAIL == "peak_aware":
                counts = pick_peak_aware(weights_ptr, counts, expert_ptr, rank_ptr, p - tail, p, e, EXPERTS)
            elif TAIL == "gated":
                counts = pick_gated(weights_ptr, counts, expert_ptr, rank_ptr, p - tail, p, average_ptr, e, EXPERTS)
        tl.debug_barrier()
        if FIX:
            counts = move_replicas(
                weights_ptr, counts, expert_ptr, rank_ptr, FIXUP_MOVES, FIXUP_DONORS, FIXUP_PEAK, FIXUP_TIE, e, p,
                EXPERTS, REPLICAS,
            )  # fmt: skip
            tl.debug_barrier()
    return counts


@triton.jit
def _tail_length(statistics_ptr, num_rows, TAIL: tl.constexpr, NUM_REDUNDANT: tl.constexpr):
    """How many of the redundant replicas the tail rule picks; the rest goes by D'Hondt."""
    if TAIL == "dhondt":
        return 0
    elif TAIL == "dispersion":
        return dispersion_tail(statistics_ptr, num_rows, NUM_REDUNDANT)
    elif TAIL == "simulated":
        return simulated_tail(statistics_ptr, num_rows, NUM_REDUNDANT)
    else:
        return fixed_tail(NUM_REDUNDANT)


@triton.jit
def _replica_loads(
    weights_ptr,
    counts,
    counts_ptr,
    expert_ptr,
    average_ptr,
    loads_ptr,
    e: tl.constexpr,
    p: tl.constexpr,
    EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """Load of each replica of the list, w / c; the counts to memory, to free their registers for the packing."""
    expert = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + expert, counts, mask=expert < e)
    weights = tl.load(weights_ptr + expert, mask=expert < e, other=0.0)
    tl.store(average_ptr + expert, divide(weights, tl.maximum(counts, 1)), mask=expert < e)
    tl.debug_barrier()
    replica = tl.arange(0, REPLICAS)
    its_expert = tl.load(expert_ptr + replica, mask=replica < p, other=0)
    load = tl.load(average_ptr + its_expert, mask=replica < p, other=0.0)
    tl.store(loads_ptr + replica, load, mask=replica < p)
    tl.debug_barrier()
