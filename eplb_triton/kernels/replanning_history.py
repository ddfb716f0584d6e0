"""Replanning, from loads to samples: which steps count, and what each expert got in some of them."""
# ruff: noqa: N803, N806, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import HIGHEST, bits, clean, float64, from_bits
from eplb_triton.kernels.fixed import LOAD_BITS, power_of_two

LOAD_UNITS = tl.constexpr(constants.LOAD_UNITS)
LEAST_BLOCKS = tl.constexpr(4)
"""Blocks in which a history is searched for a change of traffic; below two steps a block it is not."""
STEPS_AT_ONCE = tl.constexpr(4)
"""Steps whose loads are fetched before the first of them is used."""
WARP = tl.constexpr(32)


@triton.jit(noinline=True)
def sample_history(
    layer_ptr,  # any real dtype [num_steps, E], tokens per expert and step of the layer, oldest first
    step_stride,
    expert_stride,
    num_steps,
    memory,
    shape: tl.constexpr,
):
    """Fill memory.sample [E, T] with the loads of up to `shape.samples` steps, in LOAD_UNITS a step, the rest with 0.

    Returns how many there are, and the lowest expert with a bad load, else -1.
    """
    tl.static_assert(shape.samples <= 32, "sums of squares stay below 2^53 for 32 samples")
    largest, bad = _largest_load(layer_ptr, step_stride, expert_stride, num_steps, shape)
    scale = power_of_two(_scale(largest))
    kept = _steps_with_loads(layer_ptr, step_stride, expert_stride, num_steps, scale, memory, shape)
    idle = kept == 0
    if idle:  # one step of ones
        tl.store(memory.ints + shape.at.step, 0)
        tl.store(memory.longs + shape.at.total, tl.full((), shape.experts, tl.int64))
        kept = 1
    tl.debug_barrier()
    steps = _steps_since_change(layer_ptr, step_stride, expert_stride, kept, scale, idle, memory, shape)
    taken = _take_samples(layer_ptr, step_stride, expert_stride, kept, steps, scale, idle, memory, shape)
    return taken, bad


@triton.jit
def sample_at(row, t, ROWS: tl.constexpr, shape: tl.constexpr):
    """Where sample t of a row lies among ROWS of them: a few samples of every row, then the next few."""
    return (t // shape.together * ROWS + row) * shape.together + t % shape.together


@triton.jit
def quotient(x, y, inverse):
    """x // y of int64 numbers, 0 <= x < 2^61, 0 < y, with x / y < 2^40; `inverse`: of `inverse_of(y)`.

    The product is never above x / y and less than 1 below it: one correction makes it exact, where int64 division is a
    subroutine of a hundred instructions."""
    whole = (x.to(tl.float64) * inverse).to(tl.int64)
    return whole + (x - whole * y >= y).to(tl.int64)


@triton.jit
def inverse_of(y):
    """1 / y in float64, lowered by two units in the last place."""
    return (float64(1.0) / y.to(tl.float64)) * float64(1.0 - 2.0**-51)


@triton.jit
def _scale(largest):
    """28 - floor(log2(largest)), int64, of a float32 number; 0 of 0."""
    exponent = (largest.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023
    return tl.where(largest == 0, 0, LOAD_BITS - exponent)


@triton.jit
def _scaled(raw, inside, scale, idle):
    """Loads, int64, in fixed point; 1 each if `idle`."""
    load, _ = clean(raw)
    whole = (load.to(tl.float64) * scale).to(tl.int64)
    return tl.where(idle & inside, 1, whole)


@triton.jit
def _oldest(num_steps, shape: tl.constexpr):
    """The oldest step that counts."""
    return tl.maximum(num_steps - shape.newest_steps, 0)


@triton.jit(noinline=True)
def _largest_load(layer_ptr, step_stride, expert_stride, num_steps, shape: tl.constexpr):
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < shape.experts
    expert_ptr = layer_ptr + expert.to(tl.int64) * expert_stride
    largest = tl.full((shape.expert_lanes,), 0, tl.int32)
    bad = expert < 0
    step = _oldest(num_steps, shape)
    while step < num_steps:
        for also in tl.static_range(STEPS_AT_ONCE):
            at = tl.minimum(step + also, num_steps - 1)
            load, wrong = clean(tl.load(expert_ptr + at.to(tl.int64) * step_stride, mask=inside, other=0))
            largest = tl.maximum(largest, bits(load))
            bad = bad | (wrong & inside)
        step += STEPS_AT_ONCE
    first_bad = tl.min(tl.where(bad, expert, HIGHEST), 0)
    return from_bits(tl.max(largest, 0)), tl.where(first_bad < HIGHEST, first_bad, -1)


@triton.jit(noinline=True)
def _steps_with_loads(layer_ptr, step_stride, expert_stride, num_steps, scale, memory, shape: tl.constexpr):
    """memory.step: the steps whose loads are not all 0, memory.total: their sums. Returns how many.

    A warp to a step: its sum takes no wait for other warps."""
    ROWS: tl.constexpr = shape.lanes // WARP if shape.lanes > WARP else 1
    kept = tl.full((), 0, tl.int32)
    step = _oldest(num_steps, shape)
    while step < num_steps:
        at = step + tl.arange(0, ROWS)
        step_ptr = layer_ptr + at.to(tl.int64)[:, None] * step_stride
        totals = tl.full((ROWS, WARP), 0, tl.int64)
        for first in tl.range(0, shape.experts, WARP, loop_unroll_factor=4):
            expert = first + tl.arange(0, WARP)[None, :]
            inside = (at < num_steps)[:, None] & (expert < shape.experts)
            raw = tl.load(step_ptr + expert.to(tl.int64) * expert_stride, mask=inside, other=0)
            totals += _scaled(raw, inside, scale, False)
        total = tl.sum(totals, 1)
        keep = (total > 0).to(tl.int32)
        place = kept + tl.cumsum(keep, 0) - 1
        tl.store(memory.ints + shape.at.step + place, at, mask=keep != 0)
        tl.store(memory.longs + shape.at.total + place, total, mask=keep != 0)
        kept += tl.sum(keep, 0)
        step += ROWS
    return kept


@triton.jit
def _add_steps(layer_ptr, step_stride, expert_stride, start, stop, scale, idle, memory, shape: tl.constexpr):
    """Sum over the kept steps from `start` to below `stop`: loads [lanes] int64 of each expert, and of all."""
    expert = tl.arange(0, shape.expert_lanes)
    expert_ptr = layer_ptr + expert.to(tl.int64) * expert_stride
    loads = tl.full((shape.expert_lanes,), 0, tl.int64)
    total = tl.full((), 0, tl.int64)
    at = tl.full((), 0, tl.int32) + start  # of an int in the interpreter, too
    while at < stop:
        for also in tl.static_range(STEPS_AT_ONCE):
            there = at + also < stop
            step = tl.load(memory.ints + shape.at.step + at + also, mask=there, other=0).to(tl.int64)
            inside = expert < tl.where(there, shape.experts, 0)
            raw = tl.load(expert_ptr + step * step_stride, mask=inside, other=0)
            loads += _scaled(raw, inside, scale, idle)
            total += tl.load(memory.longs + shape.at.total + at + also, mask=there, other=0)
        at += STEPS_AT_ONCE
    return loads, total


@triton.jit(noinline=True)
def _steps_since_change(layer_ptr, step_stride, expert_stride, kept, scale, idle, memory, shape: tl.constexpr):
    """How many of the newest kept steps precede no change of traffic; memory.share: each expert's part of their loads.

    Blocks of a quarter are compared with the newest; the steps left over are used if no block differs."""
    expert = tl.arange(0, shape.expert_lanes)
    size = kept // LEAST_BLOCKS
    size = tl.where(size >= 2, size, kept + 1)  # more than there are: all are left over
    stop = kept
    loads = tl.full((shape.expert_lanes,), 0, tl.int64)
    total = tl.full((), 0, tl.int64)
    same = tl.full((), 1, tl.int32)
    newest = tl.full((shape.expert_lanes,), 0, tl.int64)
    while (stop > 0) & (same != 0):
        start = tl.maximum(stop - size, 0)
        some, its_total = _add_steps(layer_ptr, step_stride, expert_stride, start, stop, scale, idle, memory, shape)
        share = quotient(some * LOAD_UNITS, its_total, inverse_of(its_total))
        if stop == kept:
            newest = share
        if (stop >= size) & (tl.sum(tl.abs(share - newest), 0) > LOAD_UNITS // 2):
            same = same * 0
        else:
            loads += some
            total += its_total
            stop = start
    share = quotient(loads * LOAD_UNITS, total, inverse_of(total))
    tl.store(memory.ints + shape.at.share + expert, share.to(tl.int32), mask=expert < shape.experts)
    return kept - stop


@triton.jit
def _take_samples(layer_ptr, step_stride, expert_stride, kept, steps, scale, idle, memory, shape: tl.constexpr):
    """Evenly spaced steps back from the newest, moved so that their mean is each expert's share of all steps used."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    E: tl.constexpr = shape.experts
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < E
    expert_ptr = layer_ptr + expert.to(tl.int64) * expert_stride
    taken = tl.minimum(steps, shape.samples)
    every = steps // taken
    row = tl.arange(0, ROW)
    totals = tl.load(memory.longs + shape.at.total + kept - 1 - row * every, mask=row < taken, other=1)
    inverse_ptr = memory.longs + shape.at.inverse
    tl.store(inverse_ptr + row, inverse_of(totals).to(tl.int64, bitcast=True))
    tl.debug_barrier()
    added = tl.full((shape.expert_lanes,), 0, tl.int32)
    first = 0
    while first < ROW:
        made = ()
        for also in tl.static_range(STEPS_AT_ONCE):
            i = first + also
            there = i < taken
            at = kept - 1 - i * every
            step = tl.load(memory.ints + shape.at.step + at, mask=there, other=0).to(tl.int64)
            total = tl.load(memory.longs + shape.at.total + at, mask=there, other=1)
            sampled = expert < tl.where(there, E, 0)
            raw = tl.load(expert_ptr + step * step_stride, mask=sampled, other=0)
            whole = _scaled(raw, sampled, scale, idle)
            inverse = tl.load(inverse_ptr + i).to(tl.float64, bitcast=True)
            loads = quotient(whole * LOAD_UNITS, total, inverse).to(tl.int32)
            made = made + (loads,)
            added += loads
        for also in tl.static_range(STEPS_AT_ONCE):  # all before the first is stored: no load passes a store
            level_ptr = memory.ints + shape.at.level + sample_at(expert, first + also, E, shape)
            tl.store(level_ptr, made[also], mask=inside)
        first += STEPS_AT_ONCE
    tl.debug_barrier()
    shift = tl.load(memory.ints + shape.at.share + expert, mask=inside, other=0) - added // taken
    together = tl.arange(0, STEP)[None, :]
    level_ptr = memory.ints + shape.at.level + expert[:, None] * STEP + together
    sample_ptr = memory.ints + shape.at.sample + expert[:, None] * STEP + together
    for t in tl.static_range(0, ROW, STEP):
        loads = tl.load(level_ptr + t * E, mask=inside[:, None], other=0)
        loads = tl.where(t + together < taken, tl.maximum(loads + shift[:, None], 0), 0)
        tl.store(sample_ptr + t * E, loads, mask=inside[:, None])
    tl.debug_barrier()
    return taken
