"""Replanning: one program takes one layer from the placement in force to one for the loads to come."""
# ruff: noqa: PLR0912, PLR0915
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from eplb_triton.kernels.arith import bits, float64
from eplb_triton.kernels.relabelling import relabel_gpus
from eplb_triton.kernels.replanning_bounds import LESS
from eplb_triton.kernels.replanning_counts import list_donors, value_changes
from eplb_triton.kernels.replanning_fresh import fresh_plan, partition_experts
from eplb_triton.kernels.replanning_history import LOAD_UNITS, sample_history
from eplb_triton.kernels.replanning_loads import add_up_gpus, divide_loads, divide_two
from eplb_triton.kernels.replanning_moves import add_replica, multiply_own, swap
from eplb_triton.kernels.replanning_potential import (
    PEAK,
    PRICE,
    load_number,
    peak_and_least_gain,
    price_of_slot,
    rate_gpus,
    store_number,
)
from eplb_triton.kernels.replanning_previous import fill_slots, list_experts, previous_status
from eplb_triton.kernels.replanning_replicas import UNSURE, bound_replicas, find_replica
from eplb_triton.kernels.replanning_slots import list_slots, write_maps
from eplb_triton.kernels.replanning_swaps import bound_swaps, find_swap


class Memory(NamedTuple):
    """Scratch: of all layers on the host, of one layer in the kernel. What lies where is said by `Places`."""

    ints: Any  # int32 [L, num_ints]
    longs: Any  # int64 [L, num_longs]


class Outputs(NamedTuple):
    """What a launch fills; the maps are of one integer type."""

    phy2log: Any  # [L, P]
    phyrank: Any  # [L, P]
    logcnt: Any  # [L, E]
    log2phy: Any  # [L, E, width], any strides but the last; None: not wanted
    written: Any  # int64 [L]
    fills: Any  # int64 [L]
    peak_before: Any  # float64 [L]
    peak_after: Any  # float64 [L]
    status: Any  # int32 [L]
    bad: Any  # int32 [L, N], of every row of a layer: its lowest expert with a bad load, else -1, or -2 as in Maps


NO_LIMIT = tl.constexpr(0x7FFFFFFF)
SLOT_PRICE = tl.constexpr(2)
PEAK_MOVED = tl.constexpr(3)
PEAK_BEFORE = tl.constexpr(4)
"""Places in memory.numbers: the price of a slot, J of what the moves lead to, and J before them."""
NOT_A_NUMBER = tl.constexpr(0x7FF8000000000000)


@triton.jit(
    do_not_specialize=[
        "loads_ptr",
        "step_stride",
        "layer_stride",
        "expert_stride",
        "num_steps",
        "previous_ptr",
        "price_bits",
        "moves",
        "log2phy_layer_stride",
        "log2phy_stride",
    ],
)  # one compilation for every history and placement of a type, however they lie in memory
def replan_layers(
    loads_ptr,  # any real dtype [num_steps, L, E], tokens per expert, oldest step first
    step_stride: tl.int64,
    layer_stride: tl.int64,
    expert_stride: tl.int64,
    num_steps: tl.int32,
    previous_ptr,  # integer [L, P], contiguous; None: nothing is in force
    price_bits: tl.int64,  # of a float64: what a written slot must save, in mean GPU loads
    moves: tl.int32,  # slots that a layer may write
    log2phy_layer_stride: tl.int64,
    log2phy_stride: tl.int64,  # of an expert
    partitions_ptr,  # int32 [ways, G], of pack_partition
    workspace,
    out,
    shape: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    memory = Memory(workspace.ints + layer * shape.num_ints, workspace.longs + layer * shape.num_longs)
    layer_ptr = loads_ptr + layer * layer_stride
    samples, bad = sample_history(layer_ptr, step_stride, expert_stride, num_steps, memory, shape)
    node = tl.arange(0, shape.gpu_lanes)
    tl.store(out.bad + layer * shape.nodes + node, tl.zeros_like(node) + bad, mask=node < shape.nodes)
    status = tl.full((), 0, tl.int32)
    empty = tl.full((), 0, tl.int32)
    fresh = tl.full((), previous_ptr is None, tl.int1)
    if previous_ptr is not None:
        status, empty = previous_status(previous_ptr + layer * shape.replicas, memory, shape)
        if status != 0:
            _keep(previous_ptr, layer, out, shape)
        elif empty > 0:
            fill_slots(memory, shape)
        _copy(memory.ints + shape.at.slot, memory.ints + shape.at.before, shape)
    elif shape.nodes > 1:
        partition_experts(partitions_ptr, memory, shape)
    if shape.nodes > 1:
        list_experts(memory, shape)
    tl.store(out.status + layer, status)
    price = tl.full((), 0, tl.int64) + price_bits  # of an int64 in the interpreter, too
    slot_price = price_of_slot(price.to(tl.float64, bitcast=True), samples, shape)
    store_number(memory, SLOT_PRICE, slot_price, shape)
    nothing = tl.full((), NOT_A_NUMBER, tl.int64).to(tl.float64, bitcast=True)
    store_number(memory, PEAK, nothing, shape)
    store_number(memory, PEAK_BEFORE, nothing, shape)
    tl.debug_barrier()
    plans = tl.full((), 0, tl.int32)
    more = status == 0
    while more:  # plans on from what is there, then, if that took all its steps, from a fresh plan
        if fresh:
            fresh_plan(memory, samples, shape)
        if fresh | (empty > 0):  # else it was done to look at what is in force
            list_slots(memory, shape)
        gpu = tl.arange(0, shape.gpu_lanes)
        tl.store(memory.ints + shape.at.changed + gpu, gpu, mask=gpu < shape.gpus)
        none = tl.full((), 0, tl.int32)
        divide_loads(memory, samples, shape)
        most = list_donors(memory, shape)
        changed = none + shape.gpus
        most_steps = tl.where(fresh, shape.fresh_moves, shape.moves)
        limit = tl.where(fresh, NO_LIMIT, moves)
        if fresh:
            store_number(memory, PRICE, float64(0.0), shape)
        else:
            store_number(memory, PRICE, load_number(memory, SLOT_PRICE, shape), shape)
        written = tl.full((), 0, tl.int32)
        step = tl.full((), 0, tl.int32)
        moving = tl.full((), 1, tl.int1)
        while moving:
            add_up_gpus(memory, samples, changed, shape)
            heaviest, top, low, high = rate_gpus(memory, shape)
            if (step == 0) & (fresh == 0):
                peak, low = peak_and_least_gain(memory, shape)
                high = low
                store_number(memory, PEAK_BEFORE, peak, shape)
            gain, key = low, none
            is_swap = tl.full((), 1, tl.int1)
            if (step < most_steps) & (written < limit):
                multiply_own(memory, samples, heaviest, shape)
                rest, swaps = none, none
                if (written <= limit - 2) & (shape.gpus > shape.nodes):
                    rest = bound_swaps(memory, heaviest, top, shape)
                    swaps += 2 * shape.swap_rows
                starts, donors = none, none
                if fresh == 0:
                    starts, donors = value_changes(memory, samples, heaviest, top, swaps, most, shape)
                if swaps > 0:
                    gain_of_swap, its_key = find_swap(memory, samples, heaviest, top, rest, low, fresh == 0, shape)
                    if gain_of_swap > gain:
                        gain, key = gain_of_swap.to(tl.int64), its_key
                if donors > 0:
                    highest, rest = bound_replicas(memory, heaviest, top, low, high, starts, donors, most, shape)
                    if highest == UNSURE:
                        peak, low = peak_and_least_gain(memory, shape)
                        high = low
                        highest, rest = bound_replicas(memory, heaviest, top, low, high, starts, donors, most, shape)
                    if highest >= bits(gain.to(tl.float32) * LESS):
                        best, its_key = find_replica(
                            memory, samples, heaviest, top, rest, gain, starts, donors, most, shape
                        )
                        if best > gain:
                            gain, key = best, its_key
                            is_swap = tl.full((), 0, tl.int1)
                if (gain > low) & (gain <= high):
                    peak, low = peak_and_least_gain(memory, shape)
            moving = gain > low
            if moving:
                if is_swap:
                    changed = swap(memory, heaviest, key, shape)
                    written += 2
                else:
                    a, b, changed = add_replica(memory, heaviest, key, shape)
                    divide_two(memory, samples, a, b, shape)
                    most = list_donors(memory, shape)
                    written += 1
                step += 1
        peak, low = peak_and_least_gain(memory, shape)
        store_number(memory, PEAK, peak, shape)
        more = (fresh == 0) & (step == most_steps)
        if fresh == 0:
            store_number(memory, PEAK_MOVED, peak, shape)
            if more:
                _copy(memory.ints + shape.at.slot, memory.ints + shape.at.moved, shape)
        fresh = fresh | more
        plans += 1
    tl.debug_barrier()
    of_change = tl.full((), 0, tl.int32)
    peak = load_number(memory, PEAK, shape)
    if previous_ptr is not None:
        moved = tl.where(plans == 2, shape.at.moved, shape.at.slot)
        of_change = _changed(memory.ints + moved, memory, shape)
        if plans == 2:
            relabel_gpus(memory, shape)
            of_fresh = _changed(memory.ints + shape.at.slot, memory, shape)
            slot_price = load_number(memory, SLOT_PRICE, shape)
            cost = peak + slot_price * of_fresh.to(tl.float64)
            peak_moved = load_number(memory, PEAK_MOVED, shape)
            cost_of_moves = peak_moved + slot_price * of_change.to(tl.float64)
            if (of_fresh <= moves) & (cost < cost_of_moves):
                of_change = of_fresh
            else:
                _copy(memory.ints + shape.at.moved, memory.ints + shape.at.slot, shape)
                store_number(memory, PEAK, peak_moved, shape)
        if plans == 0:  # kept as it is
            of_change = of_change * 0
            empty = empty * 0
    else:
        of_change += shape.replicas
    tl.debug_barrier()
    _report(memory, samples, of_change, empty, layer, out, shape)
    if plans != 1:  # else the moves left lists of the slots
        list_slots(memory, shape)
    write_maps(memory, plans, layer, out, log2phy_layer_stride, log2phy_stride, shape)


@triton.jit(noinline=True)
def _report(memory, samples, written, fills, layer, out, shape: tl.constexpr):
    """What the plan is worth: J as a multiple of the mean GPU load, and what it costs."""
    units = (samples * LOAD_UNITS).to(tl.float64)
    tl.store(out.written + layer, written.to(tl.int64))
    tl.store(out.fills + layer, fills.to(tl.int64))
    tl.store(out.peak_before + layer, load_number(memory, PEAK_BEFORE, shape) * float64(shape.gpus) / units)
    tl.store(out.peak_after + layer, load_number(memory, PEAK, shape) * float64(shape.gpus) / units)


@triton.jit(noinline=True)
def _copy(from_ptr, to_ptr, shape: tl.constexpr):
    """The layer's slots, int32 [P]."""
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        expert = tl.load(from_ptr + slot, mask=slot < shape.replicas, other=0)
        tl.store(to_ptr + slot, expert, mask=slot < shape.replicas)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def _changed(slots_ptr, memory, shape: tl.constexpr):
    """How many slots differ from those before, int32."""
    changed = tl.full((), 0, tl.int32)
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        before = tl.load(memory.ints + shape.at.before + slot, mask=inside, other=0)
        changed += tl.sum((tl.load(slots_ptr + slot, mask=inside, other=0) != before).to(tl.int32), 0)
        start += shape.lanes
    return changed


@triton.jit
def _keep(previous_ptr, layer, out, shape: tl.constexpr):
    """What is in force, as it is."""
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        expert = tl.load(previous_ptr + layer * shape.replicas + slot, mask=slot < shape.replicas, other=0)
        tl.store(out.phy2log + layer * shape.replicas + slot, expert, mask=slot < shape.replicas)
        start += shape.lanes
