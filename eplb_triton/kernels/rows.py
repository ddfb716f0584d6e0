"""The loads of a row: groups to nodes, then the experts of a node's groups. A row is a layer, or one node of it."""
# ruff: noqa: N806, SIM300
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, clean
from eplb_triton.kernels.buffers import items_of, places_of, replicas_of
from eplb_triton.kernels.groups import group_loads, list_experts, node_loads
from eplb_triton.kernels.groups_partition import pack_partition
from eplb_triton.kernels.pack import pack_plain
from eplb_triton.kernels.refine import refine_corner, refine_nearest


@triton.jit(noinline=True)
def groups_to_nodes(
    layer_ptr,  # any real dtype [E], tokens per expert of the layer
    expert_stride,
    node,
    row_ptr,
    partitions_ptr,  # int32 [ways, num_groups], of pack_partition
    shape: tl.constexpr,
):
    """List the row's experts. Returns the load of the layer's heaviest node in fixed point, int32, and its scale,
    int64, where the exchange wants them."""
    groups: tl.constexpr = shape.groups
    partition: tl.constexpr = shape.partition
    refine: tl.constexpr = shape.policy.group_refine
    NUM_GROUPS: tl.constexpr = groups.num_items
    SIZE: tl.constexpr = shape.num_experts // NUM_GROUPS
    STEPS: tl.constexpr = refine.steps
    EXPERTS: tl.constexpr = shape.experts.expert_lanes
    WANT_NODES: tl.constexpr = shape.policy.gpu_refine.rule == "exchange" and shape.num_nodes > 1
    replicas = replicas_of(row_ptr, shape)
    heaviest = tl.full((), 0, tl.int32)
    scale = tl.full((), 0, tl.int64)
    if NUM_GROUPS == shape.num_nodes and not WANT_NODES:  # group i on node i
        expert = tl.arange(0, EXPERTS)
        tl.store(replicas.logical + expert, node * SIZE + expert, mask=expert < SIZE)
        tl.debug_barrier()
    else:
        items = items_of(row_ptr, shape)
        group_loads(layer_ptr, expert_stride, items.loads, SIZE, groups)
        if shape.policy.group_pack == "partition":
            places = places_of(row_ptr, shape)
            heaviest, scale = pack_partition(items, places, partitions_ptr, groups, partition)
        else:
            pack_plain(items, groups)
        if refine.rule == "nearest":
            refine_nearest(items, refine, groups)
        if refine.rule == "corner":
            refine_corner(items, STEPS, groups)
        tl.debug_barrier()
        if WANT_NODES and (shape.policy.group_pack != "partition" or refine.rule != "none"):
            loads, scale = node_loads(items, groups)
            heaviest = tl.max(loads, 0)
        list_experts(items.item_at, node, replicas.logical, SIZE, EXPERTS, groups)
    return heaviest, scale


@triton.jit(noinline=True)
def load_row(
    layer_ptr,
    expert_stride,
    row_ptr,
    bad_ptr,  # int32, out: lowest logical expert of the row with a bad load, else -1; None: not wanted
    shape: tl.constexpr,
):
    """The row's loads, cleaned: those that are NaN, negative or above 2^100 count as 0 from here on."""
    replicas = replicas_of(row_ptr, shape)
    expert = tl.arange(0, shape.experts.expert_lanes)
    inside = expert < shape.experts.num_experts
    logical = tl.load(replicas.logical + expert, mask=inside, other=0)
    load, bad = clean(tl.load(layer_ptr + logical.to(tl.int64) * expert_stride, mask=inside, other=0))
    tl.store(replicas.loads + expert, load, mask=inside)
    if bad_ptr is not None:
        first = tl.min(tl.where(bad & inside, logical, HIGHEST), 0)
        tl.store(bad_ptr, tl.where(first < HIGHEST, first, -1))
    tl.debug_barrier()
