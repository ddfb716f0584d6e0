"""Replanning, sums: what a replica of each expert and every GPU get in the samples, kept while single slots change."""
# ruff: noqa: N806, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import divide
from eplb_triton.kernels.replanning_history import sample_at
from eplb_triton.kernels.replanning_potential import below, floats_of, inner_product, sample_rows, sum_of_squares


@triton.jit(noinline=True)
def divide_loads(memory, samples, shape: tl.constexpr):
    """Loads of a replica of each expert: memory.level of as many replicas as there are, of one fewer and of one more,
    with their sums and spreads over the samples, and one over their number. Of as many as there are, memory.centred: T
    times the loads, less their sum, float32."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    E: tl.constexpr = shape.experts
    floats = floats_of(memory)
    together = tl.arange(0, STEP)[None, :]
    start = 0
    while start < 3 * E:
        at = start + tl.arange(0, shape.lanes)
        inside = at < 3 * E
        change = tl.minimum(at // E, 2)
        expert = tl.minimum(at - change * E, E - 1)
        inverse = _inverse_count(memory, expert, change, shape)
        load_ptr = sample_rows(memory.ints + shape.at.sample, expert, shape)
        level_ptr = sample_rows(memory.ints + shape.at.level, expert, shape) + (change * shape.row * E)[:, None]
        added = tl.full((shape.lanes, shape.together), 0, tl.int32)
        squares = tl.full((shape.lanes, shape.together), 0, tl.int64)
        row, made = (), ()
        for t in tl.static_range(0, ROW, STEP):  # all before the first is stored: no load passes a store
            row = row + (tl.load(load_ptr + t * E),)
        for t in tl.static_range(0, ROW, STEP):
            each = _divided(row[t // STEP], inverse[:, None])
            tl.store(level_ptr + t * E, each, mask=inside[:, None])
            made = made + (each,)
            added += each
            squares += each.to(tl.int64) * each
        total, square = tl.sum(added, 1), tl.sum(squares, 1)
        of_all = (inside & (change == 0))[:, None]
        centred_ptr = sample_rows(floats + shape.at.centred, expert, shape)
        for t in tl.static_range(0, ROW, STEP):  # int32: below 32 * 2^22
            centred = tl.where(t + together < samples, samples * made[t // STEP] - total[:, None], 0)
            tl.store(centred_ptr + t * E, centred.to(tl.float32), mask=of_all)
        place = change * E + expert
        tl.store(memory.ints + shape.at.sum + place, total, mask=inside)
        tl.store(floats + shape.at.inverse_count + place, inverse, mask=inside)
        tl.store(memory.longs + shape.at.spread + place, samples * square - total.to(tl.int64) * total, mask=inside)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def divide_two(memory, samples, one, other, shape: tl.constexpr):
    """As `divide_loads`, of two experts alone: a lane takes a sample, not a row."""
    E: tl.constexpr = shape.experts
    T: tl.constexpr = shape.row
    ROWS: tl.constexpr = shape.lanes // T if shape.lanes > T else 1
    floats = floats_of(memory)
    t = tl.arange(0, T)[None, :]
    start = 0
    while start < 6:  # two experts, three counts of each
        at = tl.minimum(start + tl.arange(0, ROWS), 5)
        change, expert = at // 2, tl.where(at % 2 == 0, one, other)
        its_samples = sample_at(expert[:, None], t, E, shape)
        sample = tl.load(memory.ints + shape.at.sample + its_samples)
        inverse = _inverse_count(memory, expert[:, None], change[:, None], shape)
        level = _divided(sample, inverse)
        total, square = tl.sum(level, 1), sum_of_squares(level)
        centred = tl.where(t < samples, samples * level - total[:, None], 0).to(tl.float32)
        tl.store(memory.ints + shape.at.level + (change * T * E)[:, None] + its_samples, level)
        tl.store(floats + shape.at.centred + its_samples, centred, mask=(change == 0)[:, None])
        place = change * E + expert
        # by the first lane of a row: in another layout it would be divided once more
        tl.store(floats + shape.at.inverse_count + place[:, None] + t * 0, inverse + t * 0.0, mask=t == 0)
        tl.store(memory.ints + shape.at.sum + place, total)
        tl.store(memory.longs + shape.at.spread + place, samples * square - total.to(tl.int64) * total)
        start += ROWS
    tl.debug_barrier()


@triton.jit
def _inverse_count(memory, expert, change, shape: tl.constexpr):
    """1 / replicas of experts, float32: of as many as there are (change 0), one fewer (1), one more (2); at least 1."""
    replicas = tl.load(memory.ints + shape.at.count + expert)
    replicas += tl.where(change == 1, -1, tl.where(change == 2, 1, 0))
    return divide(1.0, tl.maximum(replicas, 1))


@triton.jit
def _divided(loads, inverse):
    """loads // replicas, int32."""
    # (load + 1/2) / replicas is 1 / (2 * replicas) or more from a whole number; loads are below 2^22, so that the
    # rounding of the inverse and of the product, 2^-24 each, stay below that: cut, it is load // replicas
    return ((loads.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit(noinline=True)
def add_up_gpus(memory, samples, num, shape: tl.constexpr):
    """Of the first `num` GPUs of memory.changed, from their slots: loads in every sample, their sum M, the spreads U,
    and T * Q - M^2 + U; of their slots memory.given, float32: what T * Q - M^2 + U would be if its GPU
    gave it away, less the spread of both, or less; memory.slot_sum and memory.times."""
    S: tl.constexpr = shape.slots
    T: tl.constexpr = shape.row
    ROWS: tl.constexpr = shape.lanes // T if shape.lanes > T else 1
    t = tl.arange(0, T)[None, :]
    start = 0
    while start < num:
        gpu = tl.load(memory.ints + shape.at.changed + tl.minimum(start + tl.arange(0, ROWS), num - 1))
        load = tl.full((ROWS, T), 0, tl.int32)
        spread = tl.full((ROWS,), 0, tl.int64)
        for j in tl.range(0, S, loop_unroll_factor=3):
            expert = tl.load(memory.ints + shape.at.slot + gpu * S + j)
            load += tl.load(memory.ints + shape.at.level + sample_at(expert[:, None], t, shape.experts, shape))
            spread += tl.load(memory.longs + shape.at.spread + expert)
        tl.store(memory.ints + shape.at.gpu_load + sample_at(gpu[:, None], t, shape.gpus, shape), load)
        mean = tl.sum(load, 1)
        square = sum_of_squares(load)
        tl.store(memory.ints + shape.at.gpu_sum + gpu, mean)
        tl.store(memory.longs + shape.at.gpu_spread + gpu, spread)
        tl.store(memory.longs + shape.at.gpu_variance + gpu, samples * square - mean.to(tl.int64) * mean + spread)
        start += ROWS
    tl.debug_barrier()
    floats = floats_of(memory)
    start = 0
    while start < num * S:
        at = tl.minimum(start + tl.arange(0, shape.lanes), num * S - 1)
        gpu, slot_of_gpu = tl.load(memory.ints + shape.at.changed + at // S), at % S
        slot = gpu * S + slot_of_gpu
        expert = tl.load(memory.ints + shape.at.slot + slot)
        slot_sum = tl.load(memory.ints + shape.at.sum + expert)
        spread = tl.load(memory.longs + shape.at.spread + expert)
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu).to(tl.int64)
        variance = tl.load(memory.longs + shape.at.gpu_variance + gpu)
        times = tl.full((shape.lanes,), 0, tl.int32)
        earlier = at < 0
        for j in tl.range(0, S, loop_unroll_factor=4):
            equal = tl.load(memory.ints + shape.at.slot + gpu * S + j) == expert
            times += equal.to(tl.int32)
            earlier = earlier | (equal & (slot_of_gpu > j))
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        level_ptr = sample_rows(memory.ints + shape.at.level, expert, shape)
        product = samples * inner_product(load_ptr, shape.gpus, level_ptr, shape.experts, shape)
        given = variance - 2 * (product - mean * slot_sum)
        tl.store(memory.ints + shape.at.slot_sum + slot, slot_sum)
        tl.store(floats + shape.at.given + slot, below(given.to(tl.float32), spread.to(tl.float32), shape))
        tl.store(memory.ints + shape.at.times + slot, tl.where(earlier, 0, times))
        start += shape.lanes
    tl.debug_barrier()
