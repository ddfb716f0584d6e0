"""Replanning, the placement in force: whether it can be planned on, and replicas for its empty slots."""
# ruff: noqa: N806, RUF059, SIM102
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import replan_status
from eplb_triton.kernels.arith import HIGHEST, largest_double
from eplb_triton.kernels.replanning_potential import total_loads
from eplb_triton.kernels.replanning_slots import list_slots

OUT_OF_RANGE = tl.constexpr(replan_status.OUT_OF_RANGE)
EMPTY_ON_NODES = tl.constexpr(replan_status.EMPTY_ON_NODES)
EXPERTS_MISSING = tl.constexpr(replan_status.EXPERTS_MISSING)
GROUP_SPLIT = tl.constexpr(replan_status.GROUP_SPLIT)
GROUPS_UNEVEN = tl.constexpr(replan_status.GROUPS_UNEVEN)


@triton.jit(noinline=True)
def previous_status(previous_ptr, memory, shape: tl.constexpr):
    """memory.slot: the layer's placement in force, int64 [P]. Returns its status and how many of its slots are empty.

    An expert outside its range is taken for an empty slot from here on."""
    out_of_range = tl.full((), 0, tl.int32)
    empty = tl.full((), 0, tl.int32)
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        expert = tl.load(previous_ptr + slot, mask=inside, other=0)
        good = (expert >= 0) & (expert < shape.experts)
        out_of_range += tl.sum((inside & (good == 0) & (expert != -1)).to(tl.int32), 0)
        empty += tl.sum((inside & (good == 0)).to(tl.int32), 0)
        tl.store(memory.ints + shape.at.slot + slot, tl.where(good, expert, -1).to(tl.int32), mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    status = _node_of_experts(memory, empty, shape)
    if shape.nodes > 1:
        if empty > 0:
            status = tl.full((), EMPTY_ON_NODES, tl.int32)
    if out_of_range > 0:
        status = tl.full((), OUT_OF_RANGE, tl.int32)
    return status, empty


@triton.jit
def _node_of_experts(memory, empty, shape: tl.constexpr):
    """memory.node: of each expert, which its group shares. Returns the status of a placement within range."""
    E: tl.constexpr = shape.experts
    SIZE: tl.constexpr = E // shape.groups
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < E
    P: tl.constexpr = shape.replicas // shape.nodes
    list_slots(memory, shape)
    count = tl.load(memory.ints + shape.at.count + expert, mask=inside, other=0)
    held = inside & (count > 0)
    first = tl.load(memory.ints + shape.at.link + expert, mask=held, other=HIGHEST) // P
    last = tl.load(memory.ints + shape.at.last + expert, mask=held, other=-1) // P
    missing = tl.sum((inside & (count == 0)).to(tl.int32), 0)
    status = tl.full((), 0, tl.int32)
    if shape.nodes > 1:
        tl.store(memory.ints + shape.at.node + expert, tl.where(first == last, first, -1), mask=inside)
        tl.debug_barrier()
        group = tl.load(memory.ints + shape.at.node + expert // SIZE * SIZE, mask=inside, other=0)
        split = tl.sum((inside & ((first != last) | (first != group))).to(tl.int32), 0)
        uneven = tl.full((), 0, tl.int32)
        for node in tl.range(0, shape.nodes):
            its_experts = tl.sum((inside & (first == node)).to(tl.int32), 0)
            uneven += (its_experts != E // shape.nodes).to(tl.int32)
        if uneven > 0:
            status = tl.full((), GROUPS_UNEVEN, tl.int32)
        if split > 0:
            status = tl.full((), GROUP_SPLIT, tl.int32)
    if missing > empty:
        status = tl.full((), EXPERTS_MISSING, tl.int32)
    return status


@triton.jit(noinline=True)
def list_experts(memory, shape: tl.constexpr):
    """memory.node_expert: the experts of each node, ascending, from memory.node; those of no node are left out."""
    expert = tl.arange(0, shape.expert_lanes)
    node = tl.load(memory.ints + shape.at.node + expert, mask=expert < shape.experts, other=-1)
    for number in tl.range(0, shape.nodes):
        mine = node == number
        place = number * (shape.experts // shape.nodes) + tl.cumsum(mine.to(tl.int32), 0) - 1
        # a layer that cannot be planned on may have more experts on a node
        tl.store(memory.ints + shape.at.node_expert + place, expert, mask=mine & (place < shape.experts))
    tl.debug_barrier()


@triton.jit(noinline=True)
def fill_slots(memory, shape: tl.constexpr):
    """Replicas for the empty slots, GPU then slot ascending: experts that have none, the largest load first; then
    whichever has the largest load a replica among those that the GPU does not hold, or all if it holds all.
    Ties: the lowest expert."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < E
    load, squares = total_loads(memory, tl.minimum(expert, E - 1), shape)
    count = tl.load(memory.ints + shape.at.count + expert, mask=inside, other=0)
    for slot in tl.range(0, shape.replicas):
        if tl.load(memory.ints + shape.at.slot + slot) < 0:
            held = expert < 0
            for j in tl.range(0, S):
                held = held | (tl.load(memory.ints + shape.at.slot + slot // S * S + j) == expert)
            absent = inside & (count == 0)
            free = inside & (held == 0)
            eligible = inside
            if tl.max(absent.to(tl.int32), 0) > 0:
                eligible = absent
            elif tl.max(free.to(tl.int32), 0) > 0:
                eligible = free
            # loads below 2^26 and counts below 2^12: different fractions differ in float64 and keep their order
            share = load.to(tl.float64) / tl.maximum(count, 1).to(tl.float64)
            _, chosen = largest_double(share, eligible, expert)
            count += (expert == chosen).to(tl.int32)
            tl.debug_barrier()
            tl.store(memory.ints + shape.at.slot + slot, chosen)
            tl.debug_barrier()
