"""Replanning, a plan from the samples alone: counts, then blocks, node by node."""
# ruff: noqa: N806, RUF059
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import float64
from eplb_triton.kernels.buffers import items_of, places_of, replicas_of
from eplb_triton.kernels.fixed import fixed_point
from eplb_triton.kernels.fused import replica_loads
from eplb_triton.kernels.groups_partition import pack_partition
from eplb_triton.kernels.pack_blocks import fill_blocks
from eplb_triton.kernels.replanning_potential import total_loads
from eplb_triton.kernels.replicate_capped import capped_counts
from eplb_triton.kernels.replicate_waterfill import list_by_expert


@triton.jit(noinline=True)
def partition_experts(partitions_ptr, memory, shape: tl.constexpr):
    """memory.node: the node of each expert, of the partition whose heaviest node is lightest."""
    G: tl.constexpr = shape.groups
    N: tl.constexpr = shape.nodes
    E: tl.constexpr = shape.experts
    SIZE: tl.constexpr = E // G
    PLAN: tl.constexpr = shape.plan
    GROUPS: tl.constexpr = PLAN.groups
    PARTITION: tl.constexpr = PLAN.partition
    group = tl.arange(0, shape.group_lanes)
    inside = group < G
    total = tl.full((shape.group_lanes,), 0, tl.int64)
    for at in tl.range(0, SIZE):
        load, squares = total_loads(memory, tl.minimum(group, G - 1) * SIZE + at, shape)
        total += load
    row_ptr = _row_of(memory, shape)
    items = items_of(row_ptr, PLAN)
    tl.store(items.loads + group, total.to(tl.float32), mask=inside)
    tl.debug_barrier()
    pack_partition(items, places_of(row_ptr, PLAN), partitions_ptr, GROUPS, PARTITION)
    expert = tl.arange(0, shape.expert_lanes)
    for at in tl.range(0, G):
        its_group = tl.load(items.item_at + at)
        mine = (expert < E) & (expert // SIZE == its_group)
        tl.store(memory.ints + shape.at.node + expert, at // (G // N) + expert * 0, mask=mine)
    tl.debug_barrier()


@triton.jit(noinline=True)
def fresh_plan(memory, samples, shape: tl.constexpr):
    """memory.slot: a plan of each node's experts by their mean loads and a part of their deviations."""
    E: tl.constexpr = shape.experts
    PLAN: tl.constexpr = shape.plan
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < E
    total, square = total_loads(memory, tl.minimum(expert, E - 1), shape)
    variance = tl.maximum(samples * square - total.to(tl.int64) * total, 0)
    # z / sqrt(S): S replicas of independent loads deviate by sqrt(S) of them together
    weight = total.to(tl.float64) + float64(shape.z_of_slot) * tl.sqrt(variance.to(tl.float64))
    weight = tl.maximum(weight, float64(1.0)).to(tl.float32)
    node = expert * 0
    if shape.nodes > 1:
        node = tl.load(memory.ints + shape.at.node + expert, mask=inside, other=0)
    row_ptr = _row_of(memory, shape)
    replicas = replicas_of(row_ptr, PLAN)
    for number in tl.range(0, shape.nodes):
        mine = inside & (node == number)
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(replicas.loads + place, weight, mask=mine)
        tl.store(replicas.logical + place, expert, mask=mine)
        tl.debug_barrier()
        _replicate_node(row_ptr, PLAN)
        _pack_node(row_ptr, memory.ints + shape.at.slot + number * (shape.replicas // shape.nodes), PLAN)


@triton.jit
def _row_of(memory, shape: tl.constexpr):
    """The memory of a row of a first plan."""
    return (memory.longs + shape.at.first_plan).to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit(noinline=True)
def _replicate_node(row_ptr, shape: tl.constexpr):
    """The replicas of one node, of its experts and their loads in the memory of a row, by the stages of `balanced`."""
    EXPERTS: tl.constexpr = shape.experts
    replicas, items = replicas_of(row_ptr, shape), items_of(row_ptr, shape)
    counts = capped_counts(replicas, EXPERTS)
    list_by_expert(counts, replicas, EXPERTS)
    replica_loads(replicas, counts, items.loads, EXPERTS)


@triton.jit(noinline=True)
def _pack_node(row_ptr, slots_ptr, shape: tl.constexpr):
    """The slots of one node, of its replicas in the memory of a row, by the stages of `balanced`."""
    REPLICAS: tl.constexpr = shape.replicas
    replicas, items = replicas_of(row_ptr, shape), items_of(row_ptr, shape)
    fixed_point(items.loads, items.fixed, REPLICAS)
    fill_blocks(items, REPLICAS)
    place = tl.arange(0, REPLICAS.item_lanes)
    inside = place < REPLICAS.num_items
    expert = tl.load(replicas.expert + tl.load(items.item_at + place, mask=inside, other=0), mask=inside, other=0)
    tl.store(slots_ptr + place, tl.load(replicas.logical + expert, mask=inside, other=0), mask=inside)
    tl.debug_barrier()
