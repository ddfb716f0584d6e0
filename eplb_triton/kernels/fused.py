"""The fused kernel: one program plans one row, a layer or one node of it, from loads to maps.

After the group stage the nodes of a layer never meet again, so each program repeats the (small) group stage of its
layer and then works alone. The two rules of counts with a mean over all rows of the call read what measure.py left.

A stage is a function of its own in the compiled code (`noinline`), with the memory of the row between them: one pass of
the compiler, TritonGPUCoalesce, follows every memory access to all that it is connected with, and took nine tenths of
the time in one piece.
"""
# ruff: noqa: N803, N806, PLR1714, PLR1716, RET505
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import divide
from eplb_triton.kernels.buffers import (
    ROW_BYTES,
    Maps,
    items_of,
    places_of,
    replicas_of,
    statistics_of,
)
from eplb_triton.kernels.fixed import fixed_point, mean_target, node_target
from eplb_triton.kernels.fixup import move_replicas
from eplb_triton.kernels.fixup_paired import move_paired
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
from eplb_triton.kernels.rows import groups_to_nodes, load_row


@triton.jit(
    do_not_specialize=[
        "loads_ptr",
        "layer_stride",
        "expert_stride",
        "num_rows",
        "log2phy_layer_stride",
        "log2phy_stride",
    ]
)
def plan_rows(
    loads_ptr,  # any real dtype [L, E], tokens per expert
    layer_stride: tl.int64,
    expert_stride: tl.int64,
    num_rows: tl.int32,  # L * N
    log2phy_layer_stride: tl.int64,
    log2phy_stride: tl.int64,  # of an expert
    scratch_ptr,  # bytes: a block a row, then statistics float64 [3, L * N] from measure_rows
    partitions_ptr,  # int32 [ways, G], ways to split the groups; not read where there are none
    maps,  # Maps, out
    shape: tl.constexpr,  # Shape
):
    layer = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    row = layer * shape.num_nodes + node
    layer_ptr = loads_ptr + layer * layer_stride
    row_ptr = scratch_ptr + row * (ROW_BYTES * shape.scratch)
    statistics_ptr = statistics_of(scratch_ptr, num_rows, shape)
    heaviest_node, node_scale = groups_to_nodes(layer_ptr, expert_stride, node, row_ptr, partitions_ptr, shape)
    load_row(layer_ptr, expert_stride, row_ptr, maps.bad + row, shape)
    _replicate(row_ptr, statistics_ptr, num_rows, shape)
    scale = _pack(row_ptr, shape)
    if shape.policy.gpu_refine.rule == "exchange":
        _exchange(row_ptr, heaviest_node, node_scale, scale, shape)
    elif shape.policy.gpu_refine.rule != "none":
        _refine(row_ptr, shape)
    _write(row_ptr, layer, node, maps, log2phy_layer_stride, log2phy_stride, shape)


@triton.jit(noinline=True)
def _replicate(row_ptr, statistics_ptr, num_rows, shape: tl.constexpr):
    """Counts and replica list of the row, fixed up, and the load of each replica."""
    experts: tl.constexpr = shape.experts
    replicas = replicas_of(row_ptr, shape)
    COUNTS: tl.constexpr = shape.policy.counts
    if COUNTS == "waterfill":
        counts = waterfill_counts(replicas, experts)
    elif COUNTS == "capped":
        counts = capped_counts(replicas, experts)
    else:
        counts = _pick(replicas, statistics_ptr, num_rows, COUNTS, experts)
    counts = _fix_up(replicas, counts, COUNTS, shape)
    if COUNTS == "waterfill" or COUNTS == "capped":
        list_by_expert(counts, replicas, experts)
    tl.debug_barrier()
    replica_loads(replicas, counts, items_of(row_ptr, shape).loads, experts)


@triton.jit
def _pick(replicas, statistics_ptr, num_rows, COUNTS: tl.constexpr, shape: tl.constexpr):
    """Counts by picks, and their list: a replica of each expert, then by D'Hondt, the last by what COUNTS says."""
    e: tl.constexpr = shape.num_experts
    p: tl.constexpr = shape.num_replicas
    expert = tl.arange(0, shape.expert_lanes)
    tl.store(replicas.expert + expert, expert, mask=expert < e)
    tl.store(replicas.rank + expert, tl.zeros_like(expert), mask=expert < e)
    counts = tl.zeros_like(expert) + 1
    if p > e:
        last = _picked_last(statistics_ptr, num_rows, COUNTS, p - e)
        counts = pick_dhondt(replicas, counts, e, p - last, True, True, shape)
        if COUNTS == "dispersion" or COUNTS == "simulated":
            counts = pick_sainte_lague(replicas, counts, p - last, p, True, shape)
        elif COUNTS == "peak_aware":
            counts = pick_peak_aware(replicas, counts, p - last, p, shape)
        elif COUNTS == "gated":
            counts = pick_gated(replicas, counts, p - last, p, shape)
    tl.debug_barrier()
    return counts


@triton.jit
def _picked_last(statistics_ptr, num_rows, COUNTS: tl.constexpr, NUM_REDUNDANT: tl.constexpr):
    """How many of the redundant replicas are not D'Hondt's."""
    if COUNTS == "dhondt":
        return 0
    elif COUNTS == "dispersion":
        return dispersion_tail(statistics_ptr, num_rows, NUM_REDUNDANT)
    elif COUNTS == "simulated":
        return simulated_tail(statistics_ptr, num_rows, NUM_REDUNDANT)
    else:
        return fixed_tail(NUM_REDUNDANT)


@triton.jit
def _fix_up(replicas, counts, COUNTS: tl.constexpr, shape: tl.constexpr):
    """Counts after moves of single replicas; of a list that there is already, too."""
    experts: tl.constexpr = shape.experts
    moving: tl.constexpr = shape.policy.moving
    pairing: tl.constexpr = shape.policy.pairing
    e: tl.constexpr = experts.num_experts
    p: tl.constexpr = experts.num_replicas
    if moving.moves > 0 and p > e and e > 1:
        counts = move_replicas(replicas, counts, COUNTS != "waterfill", moving, experts)
    if pairing.moves > 0 and p == 2 * experts.num_packs:
        counts = move_paired(replicas, counts, pairing, experts)
    return counts


@triton.jit
def replica_loads(replicas, counts, loads_ptr, shape: tl.constexpr):
    """Load of each replica of the list; the counts to memory."""
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < shape.num_experts
    tl.store(replicas.counts + expert, counts, mask=inside)
    loads = tl.load(replicas.loads + expert, mask=inside, other=0.0)
    tl.store(replicas.average + expert, divide(loads, tl.maximum(counts, 1)), mask=inside)
    tl.debug_barrier()
    replica = tl.arange(0, shape.replica_lanes)
    there = replica < shape.num_replicas
    its_expert = tl.load(replicas.expert + replica, mask=there, other=0)
    tl.store(loads_ptr + replica, tl.load(replicas.average + its_expert, mask=there, other=0.0), mask=there)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _pack(row_ptr, shape: tl.constexpr):
    """Replicas onto GPUs. Returns the scale of fixed point, int64; 0 where the packing needs none."""
    packing: tl.constexpr = shape.replicas
    items = items_of(row_ptr, shape)
    scale = tl.full((), 0, tl.int64)
    if shape.policy.gpu_pack == "blocks":
        scale = fixed_point(items.loads, items.fixed, packing)
        fill_blocks(items, packing)
    elif shape.policy.gpu_pack == "spread" and shape.num_replicas > shape.num_experts:  # else nothing to spread
        pack_spread(items, packing)
    else:
        pack_plain(items, packing)
    return scale


@triton.jit(noinline=True)
def _refine(row_ptr, shape: tl.constexpr):
    """Swaps of replicas between GPUs."""
    packing: tl.constexpr = shape.replicas
    rule: tl.constexpr = shape.policy.gpu_refine
    items = items_of(row_ptr, shape)
    if rule.rule == "nearest":
        refine_nearest(items, rule, packing)
    if rule.rule == "corner" and packing.num_items > packing.num_packs:
        steps = corner_gpu_steps(items, rule, packing)
        refine_corner(items, steps, packing)
    if rule.rule == "peak":
        refine_peak(items, packing)


@triton.jit
def _exchange(row_ptr, heaviest_node, node_scale, scale, shape: tl.constexpr):
    """Exchanges of replicas between GPUs, until the heaviest is at the target."""
    MARKED: tl.constexpr = shape.num_replicas - shape.num_experts <= MARKS * shape.num_nodes
    target = _target(row_ptr, heaviest_node, node_scale, scale, MARKED, shape)
    _exchange_pairs(row_ptr, target, MARKED, shape)
    _exchange_match(row_ptr, target, MARKED, shape)
    _exchange_doubles(row_ptr, target, MARKED, shape)


@triton.jit(noinline=True)
def _target(row_ptr, heaviest_node, node_scale, scale, MARKED: tl.constexpr, shape: tl.constexpr):
    """Prepare the exchange. Returns the load that the heaviest GPU need not go below, int32 fixed point."""
    packing: tl.constexpr = shape.replicas
    experts: tl.constexpr = shape.experts
    items = items_of(row_ptr, shape)
    new_state(items, replicas_of(row_ptr, shape), places_of(row_ptr, shape), MARKED, experts)
    if shape.num_nodes > 1:
        return node_target(heaviest_node, node_scale, items.fixed, scale, packing)
    else:
        return mean_target(items.fixed, packing)


@triton.jit(noinline=True)
def _exchange_pairs(row_ptr, target, MARKED: tl.constexpr, shape: tl.constexpr):
    exchange: tl.constexpr = shape.exchange
    packing: tl.constexpr = shape.replicas
    refine_pairs(places_of(row_ptr, shape), target, exchange, MARKED, packing)


@triton.jit(noinline=True)
def _exchange_match(row_ptr, target, MARKED: tl.constexpr, shape: tl.constexpr):
    exchange: tl.constexpr = shape.exchange
    packing: tl.constexpr = shape.replicas
    refine_match(places_of(row_ptr, shape), target, exchange, MARKED, packing)


@triton.jit(noinline=True)
def _exchange_doubles(row_ptr, target, MARKED: tl.constexpr, shape: tl.constexpr):
    exchange: tl.constexpr = shape.exchange
    packing: tl.constexpr = shape.replicas
    refine_doubles(places_of(row_ptr, shape), target, exchange, MARKED, packing)


@triton.jit(noinline=True)
def _write(row_ptr, layer, node, maps, log2phy_layer_stride, log2phy_stride, shape: tl.constexpr):
    """The row's maps into those of its layer."""
    experts: tl.constexpr = shape.experts
    log2phy = maps.log2phy
    if log2phy is not None:
        log2phy += layer * log2phy_layer_stride
    of_layer = Maps(
        maps.phy2log + layer * shape.num_replicas, maps.phyrank + layer * shape.num_replicas,
        maps.logcnt + layer * shape.num_experts, log2phy, maps.bad + layer * shape.num_nodes + node,
    )  # fmt: skip
    physical_maps(
        items_of(row_ptr, shape).item_at, replicas_of(row_ptr, shape), node * experts.num_replicas, of_layer,
        log2phy_stride, shape.log2phy_width, shape.log2phy_lanes, experts,
    )  # fmt: skip
