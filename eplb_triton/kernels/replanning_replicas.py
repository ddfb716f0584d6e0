"""Replanning, one step: a slot of a donor expert becomes one more replica of an expert of the heaviest GPU.

Whoever holds the donor or the receiver gets other loads, a GPU that holds both gets both changes. What a holder of the
donor is worth afterwards, unless it holds the receiver, is the same for every receiver.
"""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, LOWEST
from eplb_triton.kernels.replanning_moves import NO_GAIN
from eplb_triton.kernels.replanning_potential import inverse_of_top, power_or_limit, sample_rows, score


@triton.jit(noinline=True)
def try_receivers(memory, samples, heaviest, top, num, floor, shape: tl.constexpr):
    """memory.receiver: slots i of the heaviest GPU whose expert, given one replica more that nobody receives yet,
    lowers the potential by more than `floor`; memory.lowered: by how much. Returns how many.

    num: slots in memory.holder. memory.held_power: of a GPU once the expert of this slot has one replica more."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    first_gpu = heaviest // D * D
    inverse = inverse_of_top(top)
    most = tl.full((), 0, tl.int32)
    start = 0
    while start < num:
        slot = tl.load(memory.ints + shape.at.holder + tl.minimum(start + tl.arange(0, shape.lanes), num - 1))
        expert = tl.load(memory.ints + shape.at.slot + slot)
        times = tl.load(memory.ints + shape.at.times + slot)
        gpu = slot // S
        cross = tl.zeros((shape.lanes,), tl.int64)
        square = tl.zeros((shape.lanes,), tl.int64)
        level_ptr = sample_rows(memory.ints + shape.at.level, expert, shape)
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
            change = tl.load(level_ptr + 2 * shape.row * E + t) - tl.load(level_ptr + t)
            cross += tl.sum(change.to(tl.int64) * tl.load(load_ptr + t), 1)
            square += tl.sum(change.to(tl.int64) * change, 1)
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu)
        mean += times * _difference(memory.ints + shape.at.sum + expert, 2 * E)
        bend = tl.load(memory.longs + shape.at.gpu_bend + gpu)
        bend += samples * (2 * times * cross + times * times * square)
        bend += times * _difference(memory.longs + shape.at.spread + expert, 2 * E)
        power = power_or_limit(score(mean, bend, shape), top, inverse, shape)
        tl.store(memory.longs + shape.at.held_power + slot, power)
        tl.store(memory.longs + shape.at.change_square + slot, square)
        most = tl.maximum(most, tl.max(tl.load(memory.ints + shape.at.count + expert), 0))
        start += shape.lanes
    tl.debug_barrier()
    i = tl.arange(0, shape.slot_lanes)
    slot = tl.load(memory.ints + shape.at.held_at + i * D + heaviest - first_gpu, mask=i < S, other=-1)
    expert = tl.load(memory.ints + shape.at.slot + slot, mask=slot >= 0, other=0)
    has_room = (slot >= 0) & (tl.load(memory.ints + shape.at.count + expert, mask=slot >= 0, other=D) < D)
    lowered = tl.zeros((shape.slot_lanes,), tl.int64)
    holder = tl.load(memory.ints + shape.at.link + expert, mask=has_room, other=-1)
    for _ in tl.range(0, most):
        listed = holder >= 0
        first = listed & (tl.load(memory.ints + shape.at.times + holder, mask=listed, other=0) > 0)
        lowered += tl.load(memory.ints + shape.at.gpu_power + holder // S, mask=first, other=0).to(tl.int64)
        lowered -= tl.load(memory.longs + shape.at.held_power + holder, mask=first, other=0)
        holder = tl.load(memory.ints + shape.at.link + E + holder, mask=listed, other=-1)
    passes = (has_room & (lowered > floor)).to(tl.int32)
    place = tl.cumsum(passes, 0) - 1
    tl.store(memory.ints + shape.at.receiver + place, i, mask=passes != 0)
    tl.store(memory.longs + shape.at.lowered + place, lowered, mask=passes != 0)
    tl.debug_barrier()
    return tl.sum(passes, 0)


@triton.jit
def _difference(values_ptr, apart):
    return tl.load(values_ptr + apart) - tl.load(values_ptr)


@triton.jit(noinline=True)
def list_donors(memory, samples, heaviest, top, shape: tl.constexpr):
    """memory.donor: on the heaviest GPU's node one slot of each GPU for each expert of several replicas. Returns how
    many, the bits that number them, and the most replicas of one.

    Of a GPU once the expert of this slot has one replica fewer: memory.donor_bend, and memory.worth, by how much its
    power falls. memory.receiving_bend: T times the squares of its loads, and spreads, without this one slot."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    P: tl.constexpr = shape.replicas // shape.nodes
    first_slot = heaviest * S // P * P
    inverse = inverse_of_top(top)
    num = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32)
    start = 0
    while start < P:
        at = start + tl.arange(0, shape.lanes)
        slot = first_slot + tl.minimum(at, P - 1)
        count = tl.load(memory.ints + shape.at.count + tl.load(memory.ints + shape.at.slot + slot))
        found = ((at < P) & (count > 1) & (tl.load(memory.ints + shape.at.times + slot) > 0)).to(tl.int32)
        tl.store(memory.ints + shape.at.donor + num + tl.cumsum(found, 0) - 1, slot, mask=found != 0)
        num += tl.sum(found, 0)
        most = tl.maximum(most, tl.max(count, 0))
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < num:
        slot = tl.load(memory.ints + shape.at.donor + tl.minimum(start + tl.arange(0, shape.lanes), num - 1))
        expert = tl.load(memory.ints + shape.at.slot + slot)
        times = tl.load(memory.ints + shape.at.times + slot)
        gpu = slot // S
        square = tl.zeros((shape.lanes,), tl.int64)
        square_without = tl.zeros((shape.lanes,), tl.int64)
        level_ptr = sample_rows(memory.ints + shape.at.level, expert, shape)
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
            fewer = tl.load(level_ptr + shape.row * E + t)
            load = tl.load(load_ptr + t) + times[:, None] * (fewer - tl.load(level_ptr + t))
            square += tl.sum(load.to(tl.int64) * load, 1)
            load -= fewer
            square_without += tl.sum(load.to(tl.int64) * load, 1)
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu)
        mean += times * _difference(memory.ints + shape.at.sum + expert, E)
        spread = tl.load(memory.longs + shape.at.gpu_spread + gpu)
        spread += times * _difference(memory.longs + shape.at.spread + expert, E)
        bend = samples * square + spread
        power = tl.load(memory.ints + shape.at.gpu_power + gpu).to(tl.int64)
        power -= power_or_limit(score(mean, bend, shape), top, inverse, shape)
        spread -= tl.load(memory.longs + shape.at.spread + E + expert)
        tl.store(memory.longs + shape.at.donor_bend + slot, bend)
        tl.store(memory.longs + shape.at.receiving_bend + slot, samples * square_without + spread)
        tl.store(memory.longs + shape.at.worth + slot, power)
        start += shape.lanes
    tl.debug_barrier()
    bits = tl.full((), 0, tl.int32)
    while (1 << bits) < num:
        bits += 1
    return num, bits, most


@triton.jit(noinline=True)
def value_pairs(memory, samples, heaviest, top, donors, bits, receivers, shape: tl.constexpr):
    """Of receiver i and donor slot, as holder of the donor: memory.fall, by how much its GPU's power falls, not
    counting what the receiver's replica alone does; as the one that receives: memory.received, what then comes on
    top, NO_GAIN where it cannot."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    first_gpu = heaviest // D * D
    inverse = inverse_of_top(top)
    start = 0
    while start < receivers << bits:
        at = start + tl.arange(0, shape.lanes)
        nth = tl.minimum(at >> bits, receivers - 1)
        i = tl.load(memory.ints + shape.at.receiver + nth)
        slot = tl.load(memory.ints + shape.at.donor + tl.minimum(at & ((1 << bits) - 1), donors - 1))
        gpu = slot // S
        a = tl.load(memory.ints + shape.at.slot + heaviest * S + i)
        b = tl.load(memory.ints + shape.at.slot + slot)
        times = tl.load(memory.ints + shape.at.times + slot)
        held = tl.load(memory.ints + shape.at.held_at + i * D + gpu - first_gpu)
        holds = held >= 0
        keeps, gets = holds.to(tl.int32), 1 - holds.to(tl.int32)
        product = tl.zeros((shape.lanes,), tl.int64)
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        receiver_ptr = sample_rows(memory.ints + shape.at.level, a, shape)
        donor_ptr = sample_rows(memory.ints + shape.at.level, b, shape)
        for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
            fewer = tl.load(donor_ptr + shape.row * E + t)
            load = tl.load(load_ptr + t) + times[:, None] * (fewer - tl.load(donor_ptr + t)) - gets[:, None] * fewer
            change = tl.load(receiver_ptr + 2 * shape.row * E + t) - keeps[:, None] * tl.load(receiver_ptr + t)
            product += tl.sum(change.to(tl.int64) * load, 1)
        added = tl.where(holds, tl.load(memory.ints + shape.at.times + held, mask=holds, other=0), 1)
        square = tl.load(memory.longs + shape.at.square + 2 * E + a)
        square = tl.where(holds, tl.load(memory.longs + shape.at.change_square + held, mask=holds, other=0), square)
        bend = tl.load(memory.longs + shape.at.receiving_bend + slot)
        bend = tl.where(holds, tl.load(memory.longs + shape.at.donor_bend + slot), bend)
        bend += samples * (2 * added * product + added * added * square)
        spread = tl.load(memory.longs + shape.at.spread + 2 * E + a)
        bend += added * (spread - tl.where(holds, tl.load(memory.longs + shape.at.spread + a), 0))
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu)
        mean += times * _difference(memory.ints + shape.at.sum + b, E)
        mean -= gets * tl.load(memory.ints + shape.at.sum + E + b)
        new = tl.load(memory.ints + shape.at.sum + 2 * E + a) - keeps * tl.load(memory.ints + shape.at.sum + a)
        after = power_or_limit(score(mean + added * new, bend, shape), top, inverse, shape)
        worth = tl.load(memory.longs + shape.at.worth + slot)
        before = tl.load(memory.ints + shape.at.gpu_power + gpu).to(tl.int64)
        both = tl.load(memory.longs + shape.at.held_power + held, mask=holds, other=0) - after
        place = i * P + slot - first_gpu * S
        tl.store(memory.longs + shape.at.fall + place, tl.where(holds, both, worth))
        # b = a is held as well
        tl.store(memory.longs + shape.at.received + place, tl.where(holds, NO_GAIN, before - after - worth))
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def find_replica(memory, heaviest, donors, bits, receivers, most, shape: tl.constexpr):
    """The best new replica: gain, and its key (own slot i, donor, receiving GPU). Ties: the lowest key.

    most: no donor has more replicas."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    first_gpu = heaviest // D * D
    best = tl.full((shape.lanes,), NO_GAIN, tl.int64)
    best_key = tl.full((shape.lanes,), HIGHEST, tl.int32)
    start = 0
    while start < receivers << bits:
        at = start + tl.arange(0, shape.lanes)
        nth = tl.minimum(at >> bits, receivers - 1)
        i = tl.load(memory.ints + shape.at.receiver + nth)
        slot = tl.load(memory.ints + shape.at.donor + tl.minimum(at & ((1 << bits) - 1), donors - 1))
        b = tl.load(memory.ints + shape.at.slot + slot)
        fall_ptr = memory.longs + shape.at.fall + i * P - first_gpu * S
        received = tl.load(memory.longs + shape.at.received + i * P - first_gpu * S + slot)
        gain = tl.load(memory.longs + shape.at.lowered + nth) + received
        holder = tl.load(memory.ints + shape.at.link + b)
        for _ in tl.range(0, most):
            listed = holder >= 0
            first = listed & (tl.load(memory.ints + shape.at.times + holder, mask=listed, other=0) > 0)
            gain += tl.load(fall_ptr + holder, mask=first, other=0)
            holder = tl.load(memory.ints + shape.at.link + E + holder, mask=listed, other=-1)
        gain = tl.where(received == NO_GAIN, NO_GAIN, gain)
        key = (i * E + b) * D + slot // S - first_gpu
        better = (gain > best) | ((gain == best) & (key < best_key))
        best = tl.where(better, gain, best)
        best_key = tl.where(better, key, best_key)
        start += shape.lanes
    return _best_candidate(best, best_key)


@triton.jit
def _best_candidate(gain, key):
    """Largest int64 gain of all lanes and its int32 key; ties: lowest key.

    Three int32 reductions, as in `largest_double`."""
    upper = (gain >> 32).to(tl.int32)
    lower = (gain & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True) ^ LOWEST
    best_upper = tl.max(upper, 0)
    best_lower = tl.max(tl.where(upper == best_upper, lower, LOWEST), 0)
    found = (upper == best_upper) & (lower == best_lower)
    low_word = (best_lower ^ LOWEST).to(tl.int64) & 0xFFFFFFFF
    return (best_upper.to(tl.int64) << 32) | low_word, tl.min(tl.where(found, key, HIGHEST), 0)


@triton.jit(noinline=True)
def add_replica(memory, heaviest, key, shape: tl.constexpr):
    """Make the new replica of a key of `find_replica`, in the donor's lowest slot on the receiving GPU.

    Returns receiver, donor and how many GPUs, those that hold either, are in memory.changed."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    links = memory.ints + shape.at.link
    a = tl.load(memory.ints + shape.at.slot + heaviest * S + key // (E * D))
    b = key // D % E
    gpu = heaviest // D * D + key % D
    link = b
    slot = tl.load(links + b)
    while (slot // S != gpu) | (tl.load(memory.ints + shape.at.times + slot) == 0):
        link = E + slot
        slot = tl.load(links + link)
    num = _list_gpus(memory, a, tl.full((), 0, tl.int32), shape)
    num = _list_gpus(memory, b, num, shape)
    after, first = tl.load(links + E + slot), tl.load(links + a)
    count_a = tl.load(memory.ints + shape.at.count + a)
    count_b = tl.load(memory.ints + shape.at.count + b)
    tl.debug_barrier()
    tl.store(memory.ints + shape.at.slot + slot, a)
    tl.store(links + link, after)
    tl.store(links + a, slot)
    tl.store(links + E + slot, first)
    tl.store(memory.ints + shape.at.count + a, count_a + 1)
    tl.store(memory.ints + shape.at.count + b, count_b - 1)
    tl.debug_barrier()
    return a, b, num


@triton.jit
def _list_gpus(memory, expert, num, shape: tl.constexpr):
    """The GPUs of an expert's slots to memory.changed, from place `num` on; where they end."""
    slot = tl.load(memory.ints + shape.at.link + expert)
    while slot >= 0:
        tl.store(memory.ints + shape.at.changed + num, slot // shape.slots)
        slot = tl.load(memory.ints + shape.at.link + shape.experts + slot)
        num += 1
    return num
