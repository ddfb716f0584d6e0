"""Replanning, a plan from the samples alone: counts, then blocks, node by node."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import divide, float64
from eplb_triton.kernels.fixed import fixed_point
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
    group = tl.arange(0, shape.group_lanes)
    inside = group < G
    total = tl.zeros((shape.group_lanes,), tl.int64)
    for at in tl.range(0, SIZE):
        load, squares = total_loads(memory, tl.minimum(group, G - 1) * SIZE + at, shape)
        total += load
    tl.store(memory.floats + shape.at.weights + group, total.to(tl.float32), mask=inside)
    tl.debug_barrier()
    pack_partition(
        memory.floats + shape.at.weights, memory.ints + shape.at.item_at, partitions_ptr,
        memory.ints + shape.at.fixed, memory.ints + shape.at.state, memory.longs + shape.at.sorted,
        G, N, shape.group_lanes, shape.node_lanes, shape.ways, shape.way_lanes, shape.proposers, shape.meetings,
    )  # fmt: skip
    expert = tl.arange(0, shape.expert_lanes)
    for at in tl.range(0, G):
        its_group = tl.load(memory.ints + shape.at.item_at + at)
        mine = (expert < E) & (expert // SIZE == its_group)
        tl.store(memory.ints + shape.at.node + expert, at // (G // N) + expert * 0, mask=mine)
    tl.debug_barrier()


@triton.jit(noinline=True)
def fresh_plan(memory, samples, shape: tl.constexpr):
    """memory.slot: a plan of each node's experts by their mean loads and a part of their deviations."""
    E: tl.constexpr = shape.experts
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
    for number in tl.range(0, shape.nodes):
        mine = inside & (node == number)
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(memory.floats + shape.at.weights + place, weight, mask=mine)
        tl.store(memory.ints + shape.at.logical + place, expert, mask=mine)
        tl.debug_barrier()
        _plan_node(memory, number, shape)


@triton.jit
def _plan_node(memory, node, shape: tl.constexpr):
    """One node of a fresh plan, by the stages of `balanced`."""
    e: tl.constexpr = shape.experts // shape.nodes
    p: tl.constexpr = shape.replicas // shape.nodes
    d: tl.constexpr = shape.gpus // shape.nodes
    weights_ptr, loads_ptr = memory.floats + shape.at.weights, memory.floats + shape.at.loads
    expert_ptr, fixed_ptr = memory.ints + shape.at.expert, memory.ints + shape.at.fixed
    item_at_ptr, spare_ptr = memory.ints + shape.at.item_at, memory.ints + shape.at.spare
    counts = capped_counts(weights_ptr, spare_ptr if shape.at_once else None, p, d, e, shape.row_experts)
    list_by_expert(
        counts, expert_ptr, memory.ints + shape.at.rank, spare_ptr, p, e, shape.row_experts, shape.row_replicas
    )  # fmt: skip
    expert = tl.arange(0, shape.row_experts)
    weight = tl.load(weights_ptr + expert, mask=expert < e, other=0.0)
    tl.store(memory.floats + shape.at.average + expert, divide(weight, tl.maximum(counts, 1)), mask=expert < e)
    tl.debug_barrier()
    replica = tl.arange(0, shape.row_replicas)
    its_expert = tl.load(expert_ptr + replica, mask=replica < p, other=0)
    load = tl.load(memory.floats + shape.at.average + its_expert, mask=replica < p, other=0.0)
    tl.store(loads_ptr + replica, load, mask=replica < p)
    tl.debug_barrier()
    fixed_point(loads_ptr, fixed_ptr, shape.slots, p, shape.row_replicas)
    fill_blocks(
        fixed_ptr, expert_ptr, item_at_ptr, memory.longs + shape.at.sorted, spare_ptr, p, d, shape.row_replicas,
        shape.row_gpus,
    )  # fmt: skip
    item = tl.load(item_at_ptr + replica, mask=replica < p, other=0)
    its_expert = tl.load(expert_ptr + item, mask=replica < p, other=0)
    logical = tl.load(memory.ints + shape.at.logical + its_expert, mask=replica < p, other=0)
    tl.store(memory.ints + shape.at.slot + node * p + replica, logical, mask=replica < p)
    tl.debug_barrier()
