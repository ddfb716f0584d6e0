"""The loads of a row: groups to nodes, then the experts of a node's groups. A row is a layer, or one node of it."""
# ruff: noqa: N806, SIM300
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, clean
from eplb_triton.kernels.buffers import group_items, places_of, replicas_of
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
    NUM_GROUPS: tl.constexpr = shape.groups.num_items
    SIZE: tl.constexpr = shape.num_experts // NUM_GROUPS
    RULE: tl.constexpr = shape.policy.group_refine.rule
    WANT_NODES: tl.constexpr = shape.policy.gpu_refine.rule == "exchange" and shape.num_nodes > 1
    replicas = replicas_of(row_ptr, shape)
    heaviest = tl.full((), 0, tl.int32)
    scale = tl.full((), 0, tl.int64)
    if NUM_GROUPS == shape.num_nodes and not WANT_NODES:  # group i on node i
        expert = tl.arange(0, shape.experts.expert_lanes)
        tl.store(replicas.logical + expert, node * SIZE + expert, mask=expert < SIZE)
        tl.debug_barrier()
    else:
        items = group_items(row_ptr, shape)
        group_loads(layer_ptr, expert_stride, items.loads, SIZE, shape.groups)
        if shape.policy.group_pack == "partition":
            places = places_of(row_ptr, shape)
            heaviest, scale = pack_partition(items, places, partitions_ptr, shape.groups, shape.partition)
        else:
            pack_plain(items, shape.groups)
        if RULE == "nearest":
            refine_nearest(items, shape.policy.group_refine, shape.groups)
        if RULE == "corner":
            refine_corner(items, shape.policy.group_refine.steps, shape.groups)
        tl.debug_barrier()
        if WANT_NODES and (shape.policy.group_pack != "partition" or RULE != "none"):
            loads, scale = node_loads(items, shape.groups)
            heaviest = tl.max(loads, 0)
        list_experts(items.item_at, node, replicas.logical, SIZE, shape.experts.expert_lanes, shape.groups)
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
