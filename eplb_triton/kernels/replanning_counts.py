"""Replanning, one step: which experts may give a replica, and what GPUs are worth once an expert has another count.

Whoever holds the donor or the receiver of a new replica gets other loads, a GPU that holds both gets both changes. What
a holder of the donor is worth afterwards, unless it holds the receiver, is the same for every receiver.
"""
# ruff: noqa: N806, PLR0915
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.replanning_bounds import GREATER, NO_BOUND
from eplb_triton.kernels.replanning_moves import expert_of_node
from eplb_triton.kernels.replanning_potential import INVERSE, floats_of, load_number, power_or_limit, sample_rows, score
from eplb_triton.kernels.replanning_swaps import ABOVE_TOP, swap_at

AT_ONCE = tl.constexpr(4)
"""Replicas of an expert that a lane looks up at once."""
TOO_LITTLE = tl.constexpr(-(2.0**62))
"""A variance of which nothing is known."""
ONE_EXPERT = tl.constexpr(1 << 16)
"""In numbers of donor slots, of which there are fewer: one of their experts."""


@triton.jit(noinline=True)
def list_donors(memory, shape: tl.constexpr):
    """memory.donor: slots of experts of several replicas, those of an expert side by side from place memory.donor_first
    on; memory.donor_of: the expert by place; memory.donor_expert: these experts; memory.donor_at: the place of each
    slot, or -1; memory.donor_start: where those of each node begin, and the last ones end, of the slots plus
    `ONE_EXPERT` times that of the experts. Returns the most replicas of an expert."""
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
        listed = tl.where(count > 1, count + ONE_EXPERT, 0)
        before = num + tl.cumsum(listed, 0) - listed
        first = before % ONE_EXPERT
        tl.store(memory.ints + shape.at.donor_first + expert, first, mask=inside)
        tl.store(memory.ints + shape.at.donor_expert + before // ONE_EXPERT, expert, mask=count > 1)
        tl.store(memory.ints + shape.at.donor_start + at // OF_NODE, before, mask=inside & (at % OF_NODE == 0))
        tl.store(memory.ints + shape.at.donor_start + shape.nodes + at * 0, before + listed, mask=at == E - 1)
        if shape.lanes < E:
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
                tl.store(memory.ints + shape.at.donor_of + its_place, expert, mask=held & (count > 1))
                slot = tl.load(memory.ints + shape.at.link + E + slot, mask=held, other=-1)
                nth += 1
        start += shape.lanes
    tl.debug_barrier()
    return most


@triton.jit(noinline=True)
def value_changes(memory, samples, heaviest, top, swaps, most, shape: tl.constexpr):
    """What GPUs are worth after the most promising swaps, and once a single expert has another count. Returns where the
    node's donors begin, and how many: as memory.donor_start counts them.

    memory.swap_power: of the heaviest GPU, then of the other one, after each swap; ABOVE_TOP if its score is.
    By place of a donor slot, once there is one replica fewer: memory.fewer_power, of its GPU, ABOVE_TOP likewise; for
    bounds (bits of float32), memory.rise_sum and memory.rise_variance, by how much M and T * Q - M^2 + U of that GPU
    rise; memory.left_sum and memory.left_variance, what they are if the slot is given away, or less; the sum is above
    any where an earlier slot of the GPU says it. Variances are TOO_LITTLE where the GPU holds the expert twice.

    By place n among the slots of the expert in slot i of the heaviest GPU: memory.grown [i, n], by how much the power
    of its GPU falls with one replica more, 0 from its last slot on, up to a multiple of AT_ONCE, and where each GPU of
    the node has one. By i and GPU, memory.held_power, what it then is, ABOVE_TOP likewise, and for bounds
    memory.held_sum and memory.held_variance, as above, less what a score is cut by. By i, for bounds, memory.own_part,
    c / (c + 1) of c replicas; memory.own_sum, what one of c + 1 adds to a score but for the root, or less;
    memory.own_variance, what its two spreads are below those of c / (c + 1) times as much.

    swaps: twice as many as `bound_swaps` chose, or 0. most: no expert has more replicas."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    AHEAD: tl.constexpr = shape.ahead if shape.ahead * STEP < ROW else ROW // STEP
    floats = floats_of(memory)
    node = heaviest // D
    inverse = load_number(memory, INVERSE, shape)
    starts = tl.load(memory.ints + shape.at.donor_start + node)
    listed = tl.load(memory.ints + shape.at.donor_start + node + 1) - starts
    first, num = starts % ONE_EXPERT, listed % ONE_EXPERT
    rows = swaps + num + (most + AT_ONCE - 1) // AT_ONCE * AT_ONCE * S
    start = 0
    # both GPUs of swaps, those of donors, then those that hold the experts of the heaviest GPU
    while start < rows:
        at = tl.minimum(start + tl.arange(0, shape.lanes), rows - 1)
        swapped = at < swaps
        fewer = (at < swaps + num) & (swapped == 0)
        second = (swapped & (at >= shape.swap_rows)).to(tl.int32)
        place = tl.where(swapped, 0, at - swaps)
        of_own = tl.where(swapped | fewer, 0, place - num)
        nth, own = of_own // S, of_own % S
        swap = tl.load(memory.ints + shape.at.promising + at - second * shape.swap_rows, mask=swapped, other=0)
        i, other_slot, _ = swap_at(heaviest, swap, shape)
        own_slot = heaviest * S + tl.where(swapped, i, own)
        a = tl.load(memory.ints + shape.at.slot + own_slot)
        count = tl.load(memory.ints + shape.at.count + a)
        its_first = tl.load(memory.ints + shape.at.donor_first + a)
        grows = (swapped | fewer) == 0
        grows = grows & (nth < count) & (tl.load(memory.ints + shape.at.times + own_slot) > 0)
        donor = tl.where(fewer, first + place, its_first + nth)
        of_donors = fewer | (grows & (count > 1))
        slot = tl.load(memory.ints + shape.at.donor + donor)  # of another row, not looked at
        slot = tl.where(of_donors, slot, tl.where(swapped, other_slot, own_slot))
        expert = tl.load(memory.ints + shape.at.slot + slot)
        # a row: the loads of a GPU; `times` those of a replica of `new`, which comes in a swap or has another count,
        # instead of those of `old`, which goes in a swap or has its count
        times = tl.where(swapped, 1, tl.load(memory.ints + shape.at.times + slot))
        own_changes = swapped & (second == 0)
        gpu = tl.where(own_changes, heaviest, slot // S)
        new = tl.where(swapped & (second == 1), a, expert)
        old = tl.where(own_changes, a, expert)
        its_change = tl.where(swapped, 0, tl.where(fewer, 1, 2))
        load_ptr = sample_rows(memory.ints + shape.at.gpu_load, gpu, shape)
        old_ptr = sample_rows(memory.ints + shape.at.level, old, shape)
        new_ptr = sample_rows(memory.ints + shape.at.level, new + its_change * (E * ROW // STEP), shape)
        new += its_change * E
        gpu_sum = tl.load(memory.ints + shape.at.gpu_sum + gpu)
        old_sum = tl.load(memory.ints + shape.at.sum + old)
        added_sum = tl.load(memory.ints + shape.at.sum + new) - old_sum
        mean = gpu_sum + times * added_sum
        old_spread = tl.load(memory.longs + shape.at.spread + old)
        new_spread = tl.load(memory.longs + shape.at.spread + new)
        spread = tl.load(memory.longs + shape.at.gpu_spread + gpu) + times * (new_spread - old_spread)
        its_power = tl.load(memory.ints + shape.at.gpu_power + gpu)
        given = tl.load(floats + shape.at.given + slot)
        own_part = count.to(tl.float32) * tl.load(floats + shape.at.inverse_count + 2 * E + a)
        squares = tl.full((shape.lanes, STEP), 0, tl.int64)
        for first_of in tl.range(0, ROW, AHEAD * STEP):
            for piece in tl.static_range(0, AHEAD * STEP, STEP):
                t = first_of + piece
                load = tl.load(load_ptr + t * shape.gpus)
                load += times[:, None] * (tl.load(new_ptr + t * E) - tl.load(old_ptr + t * E))
                squares += load.to(tl.int64) * load
        variance = samples * tl.sum(squares, 1) - mean.to(tl.int64) * mean + spread
        its_score = score(mean, variance, shape)
        power = power_or_limit(its_score, top, inverse, shape)
        fall = its_power.to(tl.int64) - power
        near = tl.minimum(power, ABOVE_TOP).to(tl.int32)
        left_sum = tl.where(times > 0, (gpu_sum - old_sum).to(tl.float32), -NO_BOUND)
        risen = variance - tl.load(memory.longs + shape.at.gpu_variance + gpu)
        several = times > 1
        # of the products of what two experts change by, as `bound_replicas` takes them; by Cauchy and Schwarz, 2 x y
        # being at most x^2 / 256 + 256 y^2
        off = old_spread.to(tl.float32) * 2.0**-8
        tl.store(memory.ints + shape.at.fewer_power + place, near, mask=fewer)
        tl.store(floats + shape.at.left_sum + place, left_sum, mask=fewer)
        tl.store(floats + shape.at.left_variance + place, tl.where(several, TOO_LITTLE, given), mask=fewer)
        tl.store(floats + shape.at.rise_sum + place, (times * added_sum).to(tl.float32), mask=fewer)
        rise_variance = tl.where(several, TOO_LITTLE, risen.to(tl.float32) - off)
        tl.store(floats + shape.at.rise_variance + place, rise_variance, mask=fewer)
        # loads of a replica with one more are those of one times c / (c + 1), but for numbers within a range of
        # (2 * c - 1) / (c + 1): the root of their spread is at most `samples` times half of that
        own_off = samples * shape.z * GREATER * (1.5 * own_part - 0.5) + (shape.z + 2.0)
        own_sum = (old_sum + added_sum).to(tl.float32) - own_off
        own_variance = 2.0 * own_part * (1.0 - own_part) * old_spread.to(tl.float32)
        first_row = grows & (nth == 0)
        tl.store(floats + shape.at.own_part + own, own_part, mask=first_row)
        tl.store(floats + shape.at.own_sum + own, own_sum, mask=first_row)
        tl.store(floats + shape.at.own_variance + own, own_variance, mask=first_row)
        grown = own * shape.grown_row + nth
        lowers = tl.where(grows & (count < D), fall, 0)
        tl.store(memory.longs + shape.at.grown + grown, lowers, mask=(swapped | fewer) == 0)
        held = own * D + gpu - heaviest // D * D
        says = grows & (times > 0)  # else an earlier slot of the GPU does
        tl.store(memory.ints + shape.at.held_power + held, near, mask=says)
        tl.store(floats + shape.at.held_sum + held, mean.to(tl.float32) - (shape.z + 2.0), mask=says)
        off += 1024.0 * samples * samples
        held_variance = tl.where(several, TOO_LITTLE, variance.to(tl.float32) - off)
        tl.store(floats + shape.at.held_variance + held, held_variance, mask=says)
        tl.store(memory.ints + shape.at.swap_power + at, near, mask=swapped)
        start += shape.lanes
    tl.debug_barrier()
    return starts, listed
