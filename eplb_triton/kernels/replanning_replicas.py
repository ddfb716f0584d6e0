"""Replanning, one step: a slot of a donor expert becomes one more replica of an expert of the heaviest GPU.

Whoever holds the donor or the receiver gets other loads, a GPU that holds both gets both changes. What a holder of the
donor is worth afterwards, unless it holds the receiver, is the same for every receiver.
"""
# ruff: noqa: N806, PLR0915, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import LOWEST
from eplb_triton.kernels.replanning_moves import expert_of_node
from eplb_triton.kernels.replanning_potential import INVERSE, NO_GAIN, load_number, power_or_limit, sample_rows, score
from eplb_triton.kernels.replanning_swaps import ABOVE_TOP, swap_at

AT_ONCE = tl.constexpr(4)
"""Replicas of an expert that a lane looks up at once."""


@triton.jit(noinline=True)
def list_donors(memory, shape: tl.constexpr):
    """memory.donor: slots of experts of several replicas, those of an expert side by side from place memory.donor_first
    on; memory.donor_at: the place of each slot, or -1; memory.donor_start: where those of each node begin, and the last
    ones end. Returns the most replicas of an expert."""
    E: tl.constexpr = shape.experts
    OF_NODE: tl.constexpr = E // shape.nodes
    most = tl.full((), 1, tl.int32)
    num = tl.full((), 0, tl.int32)
    start = 0
    while start < E:
        at = start + tl.arange(0, shape.lanes)
        inside = at < E
        place = tl.minimum(at, E - 1)
        expert = expert_of_node(memory, place // OF_NODE, place % OF_NODE, shape)
        count = tl.where(inside, tl.load(memory.ints + shape.at.count + expert), 0)
        listed = tl.where(count > 1, count, 0)
        first = num + tl.cumsum(listed, 0) - listed
        tl.store(memory.ints + shape.at.donor_first + expert, first, mask=inside)
        tl.store(memory.ints + shape.at.donor_start + at // OF_NODE, first, mask=inside & (at % OF_NODE == 0))
        num += tl.sum(listed, 0)
        of_any = tl.max(count, 0)
        most = tl.maximum(most, of_any)
        slot = tl.load(memory.ints + shape.at.link + expert, mask=inside, other=-1)
        nth = 0
        while nth < of_any:
            for _ in tl.static_range(AT_ONCE):
                held = slot >= 0
                its_place = first + nth
                tl.store(memory.ints + shape.at.donor_at + slot, tl.where(count > 1, its_place, -1), mask=held)
                tl.store(memory.ints + shape.at.donor + its_place, slot, mask=held & (count > 1))
                slot = tl.load(memory.ints + shape.at.link + E + slot, mask=held, other=-1)
                nth += 1
        start += shape.lanes
    tl.store(memory.ints + shape.at.donor_start + shape.nodes, num)
    tl.debug_barrier()
    return most


@triton.jit(noinline=True)
def value_changes(memory, samples, heaviest, top, swaps, most, shape: tl.constexpr):
    """What GPUs are worth after the most promising swaps, and once a single expert has another count. Returns where the
    node's donors begin, and how many.

    memory.swap_power: of the heaviest GPU, then of the other one, after each swap; ABOVE_TOP if its score is.
    By donor slot: memory.worth, by how much the power of its GPU falls with one replica fewer. By place n among the
    slots of the expert in slot i of the heaviest GPU: memory.grown [i, n], by how much that of its GPU falls with one
    replica more, 0 from its last slot on, up to a multiple of AT_ONCE; memory.held_power, what it then is, by slot.
    Rows of loads, memory.part [2, p + S, T], with their sums, sums of squares and spreads: of the GPU of a donor slot
    once there is one replica fewer, with this one and without it; of slot i of the heaviest GPU, what one replica more
    makes of a replica's loads, as their change and as they are.

    swaps: twice as many as `bound_swaps` chose, or 0. most: no expert has more replicas."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    P: tl.constexpr = shape.replicas // shape.nodes
    ROWS: tl.constexpr = P + S
    AHEAD: tl.constexpr = shape.ahead if shape.ahead * STEP < ROW else ROW // STEP
    node = heaviest * S // P
    inverse = load_number(memory, INVERSE, shape)
    first = tl.load(memory.ints + shape.at.donor_start + node)
    num = tl.load(memory.ints + shape.at.donor_start + node + 1) - first
    rows = swaps + 2 * num + (2 + (most + AT_ONCE - 1) // AT_ONCE * AT_ONCE) * S
    start = 0
    # both GPUs of swaps, both parts of donors, both of slots of the heaviest GPU, then who holds the experts of these
    while start < rows:
        at = tl.minimum(start + tl.arange(0, shape.lanes), rows - 1)
        swapped = at < swaps
        of_donor = at - swaps
        fewer = (of_donor < 2 * num) & (swapped == 0)
        of_own = of_donor - 2 * num
        more = of_own >= 2 * S
        nth = tl.where(more, of_own // S - 2, 0)
        second = tl.where(swapped, at >= shape.swap_rows, tl.where(fewer, of_donor >= num, of_own >= S)).to(tl.int32)
        place = tl.where(swapped, 0, tl.where(fewer, of_donor - second * num, of_own % S))
        swap = tl.load(memory.ints + shape.at.promising + at - second * shape.swap_rows, mask=swapped, other=0)
        i, other_slot, _ = swap_at(heaviest, swap, shape)
        own_slot = heaviest * S + tl.where(swapped, i, tl.where(fewer, 0, place))
        a = tl.load(memory.ints + shape.at.slot + own_slot)
        count = tl.load(memory.ints + shape.at.count + a)
        its_first = tl.load(memory.ints + shape.at.donor_first + a)
        grows = more & (nth < count) & (tl.load(memory.ints + shape.at.times + own_slot) > 0)
        listed = fewer | (grows & (count > 1))
        donor = tl.where(fewer, first + place, its_first + nth)
        slot = tl.load(memory.ints + shape.at.donor + donor, mask=listed, other=0)
        slot = tl.where(listed, slot, tl.where(swapped, other_slot, own_slot))
        expert = tl.load(memory.ints + shape.at.slot + slot)
        times = tl.load(memory.ints + shape.at.times + slot)
        # a row: the loads of a GPU, if any; `gets` times those of a replica of `new`, which comes in a swap or has
        # another count; `gives` times, 0 or less, those of a replica of `old`, which goes in a swap or has its count
        own_changes = swapped & (second == 0)
        gpu = tl.where(own_changes, heaviest, slot // S)
        of_gpu = swapped | fewer | more
        has_part = fewer | (of_gpu == 0)
        gets = tl.where(fewer, times - second, tl.where(more, times, 1))
        gives = tl.where(fewer | more, -times, tl.where(swapped, -1, second - 1))
        new = tl.where(swapped & (second == 1), a, expert)
        old = tl.where(own_changes, a, expert)
        its_change = tl.where(swapped, 0, tl.where(fewer, 1, 2))
        its_row = tl.where(fewer, place, P + place)
        part = second * ROWS + its_row
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        old_ptr = sample_rows(memory.ints + shape.at.level, old, shape)
        new_ptr = sample_rows(memory.ints + shape.at.level, new, shape) + (its_change * (E * ROW))[:, None]
        part_ptr = sample_rows(memory.ints + shape.at.part, second * (ROWS * ROW // STEP) + its_row, shape)
        new += its_change * E
        mean = tl.load(memory.ints + shape.at.gpu_sum + gpu, mask=of_gpu, other=0)
        mean += gets * tl.load(memory.ints + shape.at.sum + new)
        mean += gives * tl.load(memory.ints + shape.at.sum + old)
        spread = tl.load(memory.longs + shape.at.gpu_spread + gpu, mask=of_gpu, other=0)
        spread += gets * tl.load(memory.longs + shape.at.spread + new)
        spread += gives * tl.load(memory.longs + shape.at.spread + old)
        its_power = tl.load(memory.ints + shape.at.gpu_power + gpu)
        squares = tl.full((shape.lanes, STEP), 0, tl.int64)
        for start_of in tl.static_range(0, ROW, AHEAD * STEP):
            row = ()
            for t in tl.static_range(start_of, start_of + AHEAD * STEP, STEP):  # no load passes a store
                load = tl.load(load_ptr + t * shape.gpus, mask=of_gpu[:, None], other=0)
                load += gets[:, None] * tl.load(new_ptr + t * E) + gives[:, None] * tl.load(old_ptr + t * E)
                row = row + (load,)
            for piece in tl.static_range(AHEAD):
                squares += row[piece].to(tl.int64) * row[piece]
                tl.store(part_ptr + (start_of + piece * STEP) * ROWS, row[piece], mask=has_part[:, None])
        square = tl.sum(squares, 1)
        tl.store(memory.ints + shape.at.part_sum + part, mean, mask=has_part)
        tl.store(memory.longs + shape.at.part_square + part, square, mask=has_part)
        tl.store(memory.longs + shape.at.part_spread + part, spread, mask=has_part)
        variance = samples * square - mean.to(tl.int64) * mean + spread  # of parts of their own, not looked at
        power = power_or_limit(score(mean, variance, shape), top, inverse, shape)
        fall = its_power.to(tl.int64) - power
        tl.store(memory.longs + shape.at.worth + place, fall, mask=fewer & (second == 0))
        tl.store(memory.longs + shape.at.grown + place * shape.grown_row + nth, tl.where(grows, fall, 0), mask=more)
        tl.store(memory.longs + shape.at.held_power + slot, power, mask=grows)
        tl.store(memory.ints + shape.at.swap_power + at, tl.minimum(power, ABOVE_TOP).to(tl.int32), mask=swapped)
        start += shape.lanes
    tl.debug_barrier()
    return first, num


@triton.jit(noinline=True)
def try_receivers(memory, heaviest, low, high, most, shape: tl.constexpr):
    """memory.lowered: by how much an expert in slot i of the heaviest GPU, given one replica more that nobody receives
    yet, lowers the potential, NO_GAIN where that is no more than `low`. Returns whether any is, and whether any is no
    more than `high`.

    most: no expert has more replicas."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    i = tl.arange(0, shape.slot_lanes)
    own = heaviest * S + tl.minimum(i, S - 1)
    expert = tl.load(memory.ints + shape.at.slot + own)
    count = tl.load(memory.ints + shape.at.count + expert)
    has_room = (i < S) & (count < D) & (tl.load(memory.ints + shape.at.times + own) > 0)
    falls = tl.full((shape.slot_lanes, 2), 0, tl.int64)
    grown_ptr = memory.longs + shape.at.grown + tl.minimum(i, S - 1)[:, None] * shape.grown_row
    grown_ptr += tl.arange(0, 2)[None, :]
    nth = 0
    while nth < most:
        for also in tl.static_range(0, AT_ONCE, 2):
            falls += tl.load(grown_ptr + nth + also)
        nth += AT_ONCE
    lowered = tl.sum(falls, 1)
    passes = has_room & (lowered > low)
    tl.store(memory.longs + shape.at.lowered + i, tl.where(passes, lowered, NO_GAIN), mask=i < S)
    tl.debug_barrier()
    found = tl.max(tl.where(passes, tl.where(lowered > high, 1, 3), 0), 0)
    return found > 0, found > 1


@triton.jit(noinline=True)
def value_pairs(memory, samples, heaviest, top, first, donors, shape: tl.constexpr):
    """Of receiver i and donor slot, as holder of the donor: memory.fall [S, p], by how much its GPU's power falls, not
    counting what the receiver's replica alone does; as the one that receives: memory.received, what then comes on
    top, NO_GAIN where it cannot."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    ROWS: tl.constexpr = P + S
    inverse = load_number(memory, INVERSE, shape)
    start = 0
    while start < S * donors:
        at = start + tl.arange(0, shape.pairs)
        inside = at < S * donors
        at = tl.minimum(at, S * donors - 1)
        place = at // S
        i = at - place * S
        slot = tl.load(memory.ints + shape.at.donor + first + place)
        gpu = slot // S
        listed = tl.load(memory.ints + shape.at.times + slot) > 0  # else an earlier slot of its GPU says it
        held = tl.load(memory.ints + shape.at.held_at + i * D + gpu - heaviest // D * D)
        holds = held >= 0
        rest = tl.where(holds, 0, ROWS) + place
        own = tl.where(holds, 0, ROWS) + P + i
        part_ptr = sample_rows(memory.ints + shape.at.part, tl.where(holds, 0, ROWS * (ROW // STEP)), shape)
        rest_ptr, own_ptr = part_ptr + (place * STEP)[:, None], part_ptr + ((P + i) * STEP)[:, None]
        worth = tl.load(memory.longs + shape.at.worth + place)
        before = tl.load(memory.ints + shape.at.gpu_power + gpu).to(tl.int64)
        held_power = tl.load(memory.longs + shape.at.held_power + held, mask=holds, other=0)
        times = tl.load(memory.ints + shape.at.times + held, mask=holds, other=1)
        spread = tl.load(memory.longs + shape.at.part_spread + rest)
        spread += times * tl.load(memory.longs + shape.at.part_spread + own)
        mean = tl.load(memory.ints + shape.at.part_sum + rest)
        mean += times * tl.load(memory.ints + shape.at.part_sum + own)
        square = tl.load(memory.longs + shape.at.part_square + rest)
        own_square = times * tl.load(memory.longs + shape.at.part_square + own)
        products = tl.full((shape.pairs, STEP), 0, tl.int64)
        for t in tl.static_range(0, ROW, STEP):
            products += tl.load(rest_ptr + t * ROWS).to(tl.int64) * tl.load(own_ptr + t * ROWS)
        square += times * (2 * tl.sum(products, 1) + own_square)
        variance = samples * square - mean.to(tl.int64) * mean + spread
        after = power_or_limit(score(mean, variance, shape), top, inverse, shape)
        both = held_power - after
        fall = tl.where(listed, tl.where(holds, both, worth), 0)
        tl.store(memory.longs + shape.at.fall + i * P + place, fall, mask=inside)
        # b = a is held as well
        received = tl.where(listed & (holds == 0), before - after - worth, NO_GAIN)
        tl.store(memory.longs + shape.at.received + i * P + place, received, mask=inside)
        start += shape.pairs
    tl.debug_barrier()


@triton.jit(noinline=True)
def find_replica(memory, heaviest, first, donors, most, shape: tl.constexpr):
    """The best new replica: gain, and its key (own slot i, donor, receiving GPU). Ties: the lowest key. None gains
    anything: any gain up to 0.

    most: no donor has more replicas."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    KEYS: tl.constexpr = 1 << shape.key_bits  # more than there are
    best = tl.full((shape.candidates,), 0, tl.uint64)
    start = 0
    while start < S * donors:
        at = tl.minimum(start + tl.arange(0, shape.candidates), S * donors - 1)
        place = at // S
        i = at - place * S
        slot = tl.load(memory.ints + shape.at.donor + first + place)
        b = tl.load(memory.ints + shape.at.slot + slot)
        received = tl.load(memory.longs + shape.at.received + i * P + place)
        lowered = tl.load(memory.longs + shape.at.lowered + i)
        count = tl.load(memory.ints + shape.at.count + b)
        fall_ptr = memory.longs + shape.at.fall + i * P + tl.load(memory.ints + shape.at.donor_first + b) - first
        gain = lowered + received
        nth = 0
        while nth < most:
            for also in tl.static_range(AT_ONCE):
                gain += tl.load(fall_ptr + nth + also, mask=nth + also < count, other=0)
            nth += AT_ONCE
        key = (i * E + b) * D + slot // S - heaviest // D * D
        allowed = (received != NO_GAIN) & (lowered != NO_GAIN)
        # a gain is at most the potential, 2^30 a GPU, so that with its key it takes 64 bits
        both = (gain.to(tl.uint64) << shape.key_bits) | (KEYS - 1 - key).to(tl.uint64)
        best = tl.maximum(best, tl.where(allowed & (gain > 0), both, 0))
        start += shape.candidates
    upper = (best >> 32).to(tl.uint32).to(tl.int32, bitcast=True) ^ LOWEST
    lower = best.to(tl.uint32).to(tl.int32, bitcast=True) ^ LOWEST
    best_upper = tl.max(upper, 0)
    best_lower = tl.max(tl.where(upper == best_upper, lower, LOWEST), 0) ^ LOWEST
    found = (best_upper ^ LOWEST).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    found |= best_lower.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (found >> shape.key_bits).to(tl.int64), KEYS - 1 - (best_lower & (KEYS - 1))
