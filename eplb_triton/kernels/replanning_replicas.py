"""Replanning, one step: a slot of a donor expert becomes one more replica of an expert of the heaviest GPU.

Whoever holds the donor or the receiver gets other loads, a GPU that holds both gets both changes. What a holder of the
donor is worth afterwards, unless it holds the receiver, is the same for every receiver.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST
from eplb_triton.kernels.replanning_potential import inverse_of_top, power_of, score
from eplb_triton.kernels.replanning_moves import NO_GAIN, best_candidate


@triton.jit(noinline=True)
def list_receivers(memory, heaviest, shape: tl.constexpr):
    """memory.holder: one slot of each GPU for each expert of the heaviest GPU that may get a replica more. Returns how
    many. memory.held_at [S, d]: that slot by slot i of the heaviest GPU and GPU of its node, -1 where it has none."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    first_gpu = heaviest // D * D
    own_slot, first_slot = heaviest * S, first_gpu * S
    start = 0
    while start < S * D:
        at = start + tl.arange(0, shape.lanes)
        tl.store(memory.ints + shape.at.held_at + at, -1, mask=at < S * D)
        start += shape.lanes
    tl.debug_barrier()
    num = tl.full((), 0, tl.int32)
    start = 0
    while start < S * D:
        slot = first_slot + start + tl.arange(0, shape.lanes)
        inside = slot < first_slot + S * D
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=-1)
        first = tl.load(memory.ints + shape.at.times + slot, mask=inside, other=0) > 0
        room = tl.load(memory.ints + shape.at.count + expert, mask=inside, other=D) < D
        own = tl.full((shape.lanes,), -1, tl.int32)
        for i in tl.range(0, S):
            same = (own < 0) & (tl.load(memory.ints + shape.at.slot + own_slot + i) == expert)
            own = tl.where(same, i, own)
        found = first & room & (own >= 0)
        tl.store(memory.ints + shape.at.held_at + own * D + slot // S - first_gpu, slot, mask=found)
        place = tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(memory.ints + shape.at.holder + num + place, slot, mask=found)
        num += tl.sum(found.to(tl.int32), 0)
        start += shape.lanes
    tl.debug_barrier()
    return num


@triton.jit(noinline=True)
def try_receivers(memory, samples, heaviest, top, num, floor, shape: tl.constexpr):
    """memory.receiver: slots i of the heaviest GPU whose expert, given one replica more that nobody receives yet,
    lowers the potential by more than `floor`; memory.lowered: by how much. Returns how many.

    memory.held_power: of a GPU once the expert of this slot of it has one replica more."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    first_gpu = heaviest // D * D
    inverse = inverse_of_top(top)
    more: tl.constexpr = 2 * shape.samples * E
    start = 0
    while start < num:
        at = start + tl.arange(0, shape.lanes)
        inside = at < num
        slot = tl.load(memory.ints + shape.at.holder + at, mask=inside, other=0)
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        times = tl.load(memory.ints + shape.at.times + slot, mask=inside, other=0)
        gpu = slot // S
        cross = tl.zeros((shape.lanes,), tl.int64)
        square = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.samples, loop_unroll_factor=8):
            level = memory.ints + shape.at.level + t * E + expert
            change = tl.load(level + more, mask=inside, other=0) - tl.load(level, mask=inside, other=0)
            load = tl.load(memory.ints + shape.at.gpu_load + t * shape.gpus + gpu, mask=inside, other=0)
            cross += change.to(tl.int64) * load
            square += change.to(tl.int64) * change
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
        mean += times * _difference(memory.ints + shape.at.sum + expert, 2 * E, inside)
        bend = tl.load(memory.longs + shape.at.gpu_bend + gpu, mask=inside, other=0)
        bend += samples * (2 * times * cross + times * times * square)
        bend += times * _difference(memory.longs + shape.at.spread + expert, 2 * E, inside)
        power = power_of(score(mean, bend, shape), top, inverse, shape)
        tl.store(memory.longs + shape.at.held_power + slot, power, mask=inside)
        tl.store(memory.longs + shape.at.change_square + slot, square, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    i = tl.arange(0, shape.slot_lanes)
    lowered = tl.zeros((shape.slot_lanes,), tl.int64)
    is_receiver = (i < S) & (tl.load(memory.ints + shape.at.held_at + i * D + heaviest - first_gpu, mask=i < S, other=-1) >= 0)
    for gpu in tl.range(0, D, loop_unroll_factor=4):
        slot = tl.load(memory.ints + shape.at.held_at + i * D + gpu, mask=is_receiver, other=-1)
        power = tl.load(memory.longs + shape.at.gpu_power + first_gpu + gpu)
        lowered += tl.where(slot >= 0, power - tl.load(memory.longs + shape.at.held_power + slot, mask=slot >= 0, other=0), 0)
    passes = is_receiver & (lowered > floor)
    place = tl.cumsum(passes.to(tl.int32), 0) - 1
    tl.store(memory.ints + shape.at.receiver + place, i, mask=passes)
    tl.store(memory.longs + shape.at.lowered + place, lowered, mask=passes)
    tl.debug_barrier()
    return tl.sum(passes.to(tl.int32), 0)


@triton.jit
def _difference(values_ptr, apart, inside):
    return tl.load(values_ptr + apart, mask=inside, other=0) - tl.load(values_ptr, mask=inside, other=0)


@triton.jit(noinline=True)
def list_donors(memory, samples, heaviest, top, shape: tl.constexpr):
    """memory.donor: on the heaviest GPU's node one slot of each GPU for each expert of several replicas. Returns how
    many, and the most replicas of one.

    Of a GPU once the expert of this slot has one replica fewer: memory.donor_bend, and memory.worth, by how much its
    power falls. memory.receiving_bend: T times the squares of its loads, and spreads, without this one slot."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    first_slot = heaviest // D * D * S
    inverse = inverse_of_top(top)
    num = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32)
    start = 0
    while start < S * D:
        slot = first_slot + start + tl.arange(0, shape.lanes)
        inside = slot < first_slot + S * D
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        count = tl.load(memory.ints + shape.at.count + expert, mask=inside, other=0)
        found = inside & (count > 1) & (tl.load(memory.ints + shape.at.times + slot, mask=inside, other=0) > 0)
        place = tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(memory.ints + shape.at.donor + num + place, slot, mask=found)
        num += tl.sum(found.to(tl.int32), 0)
        most = tl.maximum(most, tl.max(count, 0))
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < num:
        at = start + tl.arange(0, shape.lanes)
        inside = at < num
        slot = tl.load(memory.ints + shape.at.donor + at, mask=inside, other=0)
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        times = tl.load(memory.ints + shape.at.times + slot, mask=inside, other=0)
        gpu = slot // S
        square = tl.zeros((shape.lanes,), tl.int64)
        square_without = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.samples, loop_unroll_factor=8):
            level = memory.ints + shape.at.level + t * E + expert
            fewer = tl.load(level + shape.samples * E, mask=inside, other=0)
            load = tl.load(memory.ints + shape.at.gpu_load + t * shape.gpus + gpu, mask=inside, other=0)
            load += times * (fewer - tl.load(level, mask=inside, other=0))
            square += load.to(tl.int64) * load
            load -= fewer
            square_without += load.to(tl.int64) * load
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
        mean += times * _difference(memory.ints + shape.at.sum + expert, E, inside)
        spread = tl.load(memory.longs + shape.at.gpu_spread + gpu, mask=inside, other=0)
        spread += times * _difference(memory.longs + shape.at.spread + expert, E, inside)
        bend = samples * square + spread
        power = tl.load(memory.longs + shape.at.gpu_power + gpu, mask=inside, other=0)
        power -= power_of(score(mean, bend, shape), top, inverse, shape)
        spread -= tl.load(memory.longs + shape.at.spread + E + expert, mask=inside, other=0)
        tl.store(memory.longs + shape.at.donor_bend + slot, bend, mask=inside)
        tl.store(memory.longs + shape.at.receiving_bend + slot, samples * square_without + spread, mask=inside)
        tl.store(memory.longs + shape.at.worth + slot, power, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    return num, most


@triton.jit(noinline=True)
def value_pairs(memory, samples, heaviest, top, donors, receivers, shape: tl.constexpr):
    """Of receiver i and donor slot, as holder of the donor: memory.fall, by how much its GPU's power falls, not counting
    what the receiver's replica alone does; as the one that receives: memory.received, what then comes on top, NO_GAIN
    where it cannot."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    first_gpu = heaviest // D * D
    inverse = inverse_of_top(top)
    more: tl.constexpr = 2 * shape.samples * E
    start = 0
    while start < receivers * donors:
        at = start + tl.arange(0, shape.lanes)
        inside = at < receivers * donors
        i = tl.load(memory.ints + shape.at.receiver + at // donors, mask=inside, other=0)
        slot = tl.load(memory.ints + shape.at.donor + at % donors, mask=inside, other=0)
        gpu = slot // S
        a = tl.load(memory.ints + shape.at.slot + heaviest * S + i, mask=inside, other=0)
        b = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        times = tl.load(memory.ints + shape.at.times + slot, mask=inside, other=0)
        held = tl.load(memory.ints + shape.at.held_at + i * D + gpu - first_gpu, mask=inside, other=-1)
        holds = held >= 0
        product = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.samples, loop_unroll_factor=8):
            level_a, level_b = memory.ints + shape.at.level + t * E + a, memory.ints + shape.at.level + t * E + b
            fewer = tl.load(level_b + shape.samples * E, mask=inside, other=0)
            load = tl.load(memory.ints + shape.at.gpu_load + t * shape.gpus + gpu, mask=inside, other=0)
            load += times * (fewer - tl.load(level_b, mask=inside, other=0)) - tl.where(holds, 0, fewer)
            change = tl.load(level_a + more, mask=inside, other=0)
            change -= tl.where(holds, tl.load(level_a, mask=inside, other=0), 0)
            product += change.to(tl.int64) * load
        added = tl.where(holds, tl.load(memory.ints + shape.at.times + held, mask=holds, other=0), 1)
        square = tl.load(memory.longs + shape.at.square + 2 * E + a, mask=inside, other=0)
        square = tl.where(holds, tl.load(memory.longs + shape.at.change_square + held, mask=holds, other=0), square)
        bend = tl.load(memory.longs + shape.at.receiving_bend + slot, mask=inside, other=0)
        bend = tl.where(holds, tl.load(memory.longs + shape.at.donor_bend + slot, mask=inside, other=0), bend)
        bend += samples * (2 * added * product + added * added * square)
        spread = tl.load(memory.longs + shape.at.spread + 2 * E + a, mask=inside, other=0)
        spread -= tl.where(holds, tl.load(memory.longs + shape.at.spread + a, mask=inside, other=0), 0)
        bend += added * spread
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=inside, other=0)
        mean += times * _difference(memory.ints + shape.at.sum + b, E, inside)
        mean -= tl.where(holds, 0, tl.load(memory.ints + shape.at.sum + E + b, mask=inside, other=0))
        new = tl.load(memory.ints + shape.at.sum + 2 * E + a, mask=inside, other=0)
        new -= tl.where(holds, tl.load(memory.ints + shape.at.sum + a, mask=inside, other=0), 0)
        mean += added * new
        after = power_of(score(mean, bend, shape), top, inverse, shape)
        worth = tl.load(memory.longs + shape.at.worth + slot, mask=inside, other=0)
        before = tl.load(memory.longs + shape.at.gpu_power + gpu, mask=inside, other=0)
        both = tl.load(memory.longs + shape.at.held_power + held, mask=holds, other=0) - after
        tl.store(memory.longs + shape.at.fall + i * P + slot - first_gpu * S, tl.where(holds, both, worth), mask=inside)
        received = tl.where(holds, NO_GAIN, before - after - worth)  # b = a is held as well
        tl.store(memory.longs + shape.at.received + i * P + slot - first_gpu * S, received, mask=inside)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit(noinline=True)
def find_replica(memory, heaviest, donors, receivers, most, shape: tl.constexpr):
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
    while start < receivers * donors:
        at = start + tl.arange(0, shape.lanes)
        inside = at < receivers * donors
        i = tl.load(memory.ints + shape.at.receiver + at // donors, mask=inside, other=0)
        slot = tl.load(memory.ints + shape.at.donor + at % donors, mask=inside, other=0)
        b = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=0)
        received = tl.load(memory.longs + shape.at.received + i * P + slot - first_gpu * S, mask=inside, other=NO_GAIN)
        allowed = received != NO_GAIN
        gain = tl.load(memory.longs + shape.at.lowered + at // donors, mask=inside, other=0) + tl.where(allowed, received, 0)
        holder = tl.load(memory.ints + shape.at.link + b, mask=allowed, other=-1)
        for _ in tl.range(0, most):
            listed = holder >= 0
            counts = listed & (tl.load(memory.ints + shape.at.times + holder, mask=listed, other=0) > 0)
            gain += tl.load(memory.longs + shape.at.fall + i * P + holder - first_gpu * S, mask=counts, other=0)
            holder = tl.load(memory.ints + shape.at.link + E + holder, mask=listed, other=-1)
        gain = tl.where(allowed, gain, NO_GAIN)
        key = (i * E + b) * D + slot // S - first_gpu
        better = (gain > best) | ((gain == best) & (key < best_key))
        best = tl.where(better, gain, best)
        best_key = tl.where(better, key, best_key)
        start += shape.lanes
    return best_candidate(best, best_key)


@triton.jit(noinline=True)
def add_replica(memory, heaviest, key, shape: tl.constexpr):
    """Make the new replica of a key of `find_replica`, in the donor's lowest slot on the receiving GPU.

    Returns receiver, donor and GPU."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    a = tl.load(memory.ints + shape.at.slot + heaviest * S + key // (E * D))
    b = key // D % E
    gpu = heaviest // D * D + key % D
    link = b
    slot = tl.load(memory.ints + shape.at.link + b)
    while (slot // S != gpu) | (tl.load(memory.ints + shape.at.times + slot) == 0):
        link = E + slot
        slot = tl.load(memory.ints + shape.at.link + link)
    after, first = tl.load(memory.ints + shape.at.link + E + slot), tl.load(memory.ints + shape.at.link + a)
    count_a, count_b = tl.load(memory.ints + shape.at.count + a), tl.load(memory.ints + shape.at.count + b)
    tl.debug_barrier()
    tl.store(memory.ints + shape.at.slot + slot, a)
    tl.store(memory.ints + shape.at.link + link, after)
    tl.store(memory.ints + shape.at.link + a, slot)
    tl.store(memory.ints + shape.at.link + E + slot, first)
    tl.store(memory.ints + shape.at.count + a, count_a + 1)
    tl.store(memory.ints + shape.at.count + b, count_b - 1)
    tl.debug_barrier()
    return a, b, gpu
