"""Replanning, one step: the swap or the new replica that lowers the potential most for each slot it writes.

Candidates are valued by inner products over the samples: of a GPU that gives a and takes b, T * Q + U is what it was,
plus terms of a, of b and of the pair. Sums of T products are made once a step, a candidate takes a few additions.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, largest
from eplb_triton.kernels.replanning_potential import inverse_of_top, power_of, sample_rows, score

NO_GAIN = tl.constexpr(-(1 << 62))


@triton.jit(noinline=True)
def multiply_own(memory, samples, heaviest, shape: tl.constexpr):
    """What the steps of the heaviest GPU h are valued by. Returns how many slots are in memory.holder.

    memory.product [S, p]: 2 T times the product of each slot of h with each slot of its node. By slot of the node:
    memory.into_own, what b adds to h, NO_GAIN where h holds it, and memory.from_partner, what o is without it. By slot
    i of h, memory.out_of_own: what h is without a; by i and GPU o, memory.into_partner: what a adds to o, NO_GAIN
    where o holds it. memory.held_at [S, d]: the lowest slot of o that holds a, for the lowest i of an expert, else -1.
    memory.holder: these slots, of experts that may get a replica more."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    own_slot, first_slot = heaviest * S, heaviest // D * P
    start = 0
    while start < S * D:
        at = start + tl.arange(0, shape.lanes)
        tl.store(memory.ints + shape.at.held_at + at, tl.full((shape.lanes,), -1, tl.int32), mask=at < S * D)
        start += shape.lanes
    tl.debug_barrier()
    num = tl.full((), 0, tl.int32)
    start = 0
    while start < P:
        num += _multiply_slots(memory, samples, heaviest, start, num, shape)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < S * D:
        at = tl.minimum(start + tl.arange(0, shape.lanes), S * D - 1)
        i, gpu = at // D, at % D
        a = tl.load(memory.ints + shape.at.slot + own_slot + i)
        theirs = tl.zeros((shape.lanes,), tl.int64)
        for j in tl.range(0, S, loop_unroll_factor=4):
            theirs += tl.load(memory.longs + shape.at.product + i * P + gpu * S + j)
        lowest = tl.load(memory.ints + shape.at.own_at + own_slot - first_slot + i)
        held = tl.load(memory.ints + shape.at.held_at + lowest * D + gpu) >= 0
        square = samples * tl.load(memory.longs + shape.at.square + a)
        spread = tl.load(memory.longs + shape.at.spread + a)
        tl.store(memory.longs + shape.at.into_partner + at, tl.where(held, NO_GAIN, theirs + square + spread))
        own = 2 * samples * tl.load(memory.longs + shape.at.own_product + own_slot + i)
        rest = tl.load(memory.longs + shape.at.gpu_bend + heaviest) - own + square - spread
        tl.store(memory.longs + shape.at.out_of_own + i, rest, mask=gpu == 0)
        start += shape.lanes
    tl.debug_barrier()
    return num


@triton.jit
def _multiply_slots(memory, samples, heaviest, start, num, shape: tl.constexpr):
    """The part of `multiply_own` by slots of the node, from `start` on; memory.own_at: the lowest i of h with the
    expert of each, or -1. Returns how many slots were added to memory.holder, from place `num` on."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    first_gpu = heaviest // D * D
    twice = 2 * samples.to(tl.int64)
    place = start + tl.arange(0, shape.lanes)
    at = tl.minimum(place, P - 1)
    gpu, slot = first_gpu + at // S, first_gpu * S + at
    b = tl.load(memory.ints + shape.at.slot + slot)
    level_ptr = sample_rows(memory.ints + shape.at.level, b, shape)
    own = tl.zeros((shape.lanes,), tl.int64)
    lowest = tl.full((shape.lanes,), -1, tl.int32)
    for i in tl.range(0, S, loop_unroll_factor=3):
        a = tl.load(memory.ints + shape.at.slot + heaviest * S + i)
        own_ptr = memory.ints + shape.at.level + a * shape.row + tl.arange(0, shape.together)[None, :]
        product = tl.zeros((shape.lanes,), tl.int64)
        for t in tl.range(0, shape.row, shape.together, loop_unroll_factor=2):
            product += tl.sum(tl.load(level_ptr + t).to(tl.int64) * tl.load(own_ptr + t), 1)
        tl.store(memory.longs + shape.at.product + i * P + at, twice * product)
        own += product
        lowest = tl.where((lowest < 0) & (a == b), i, lowest)
    square = samples * tl.load(memory.longs + shape.at.square + b)
    spread = tl.load(memory.longs + shape.at.spread + b)
    bend = tl.load(memory.longs + shape.at.gpu_bend + gpu)
    partner = twice * tl.load(memory.longs + shape.at.own_product + slot)
    tl.store(memory.longs + shape.at.into_own + at, tl.where(lowest >= 0, NO_GAIN, twice * own + square + spread))
    tl.store(memory.longs + shape.at.from_partner + at, bend - partner + square - spread)
    tl.store(memory.ints + shape.at.slot_sum + at, tl.load(memory.ints + shape.at.sum + b))
    tl.store(memory.ints + shape.at.own_at + at, lowest)
    first = (place < P) & (lowest >= 0) & (tl.load(memory.ints + shape.at.times + slot) > 0)
    tl.store(memory.ints + shape.at.held_at + lowest * D + gpu - first_gpu, slot, mask=first)
    found = (first & (tl.load(memory.ints + shape.at.count + b) < D)).to(tl.int32)
    tl.store(memory.ints + shape.at.holder + num + tl.cumsum(found, 0) - 1, slot, mask=found != 0)
    return tl.sum(found, 0)


@triton.jit(noinline=True)
def find_swap(memory, heaviest, top, shape: tl.constexpr):
    """The best swap of a slot of the heaviest GPU with one of another GPU of its node: gain a slot, int32, and its key
    (partner, own slot, partner's slot). Ties: the lowest key. No swap: a gain below 0."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    P: tl.constexpr = D * S
    first_gpu = heaviest // D * D
    own_at = (heaviest - first_gpu) * S
    inverse = inverse_of_top(top)
    own_sum = tl.load(memory.ints + shape.at.gpu_sum + heaviest)
    own_power = tl.load(memory.ints + shape.at.gpu_power + heaviest)
    best = tl.full((shape.candidates,), -1, tl.int32)
    best_key = tl.full((shape.candidates,), HIGHEST, tl.int32)
    start = 0
    while start < P * S:
        at = tl.minimum(start + tl.arange(0, shape.candidates), P * S - 1)
        i = at // P
        slot = at - i * P
        partner = slot // S
        both = tl.load(memory.longs + shape.at.product + at)
        own_bend = tl.load(memory.longs + shape.at.out_of_own + i) - both
        own_bend += tl.load(memory.longs + shape.at.into_own + slot)
        its_bend = tl.load(memory.longs + shape.at.into_partner + i * D + partner) - both
        its_bend += tl.load(memory.longs + shape.at.from_partner + slot)
        more = tl.load(memory.ints + shape.at.slot_sum + slot) - tl.load(memory.ints + shape.at.slot_sum + own_at + i)
        its_sum = tl.load(memory.ints + shape.at.gpu_sum + first_gpu + partner)
        own_score = score(own_sum + more, own_bend, shape)
        its_score = score(its_sum - more, its_bend, shape)
        own_fall = own_power - power_of(own_score, top, inverse, shape)
        its_power = tl.load(memory.ints + shape.at.gpu_power + first_gpu + partner)
        its_fall = its_power - power_of(its_score, top, inverse, shape)
        # not below 0: nobody would hold an expert twice (h holds all of its own); above the top there is no gain
        allowed = (own_bend >= 0) & (its_bend >= 0) & (tl.maximum(own_score, its_score) <= top)
        half = (own_fall >> 1) + (its_fall >> 1) + (own_fall & its_fall & 1)  # of the sum, which may take 33 bits
        gain = tl.where(allowed, half, -1)
        key = slot + partner * (S * S - S) + i * S
        better = (gain > best) | ((gain == best) & (key < best_key))
        best = tl.where(better, gain, best)
        best_key = tl.where(better, key, best_key)
        start += shape.candidates
    return largest(best, best_key)


@triton.jit(noinline=True)
def swap(memory, heaviest, key, shape: tl.constexpr):
    """Exchange the two slots of a key of `find_swap`. Returns how many GPUs are in memory.changed."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    partner = heaviest // D * D + key // (S * S)
    own = heaviest * S + key // S % S
    other = partner * S + key % S
    a = tl.load(memory.ints + shape.at.slot + own)
    b = tl.load(memory.ints + shape.at.slot + other)
    links = memory.ints + shape.at.link
    to_own, to_other = _link_to(links, a, own, E), _link_to(links, b, other, E)
    after_own, after_other = tl.load(links + E + own), tl.load(links + E + other)
    tl.debug_barrier()
    tl.store(memory.ints + shape.at.slot + own, b)
    tl.store(memory.ints + shape.at.slot + other, a)
    tl.store(links + E + own, after_other)
    tl.store(links + E + other, after_own)
    tl.store(links + to_own, other)
    tl.store(links + to_other, own)
    tl.store(memory.ints + shape.at.changed, heaviest)
    tl.store(memory.ints + shape.at.changed + 1, partner)
    tl.debug_barrier()
    return tl.full((), 2, tl.int32)


@triton.jit
def _link_to(links, expert, slot, E: tl.constexpr):
    """Where, in memory.link, the list of an expert's slots names this one."""
    link = expert
    while tl.load(links + link) != slot:
        link = E + tl.load(links + link)
    return link


@triton.jit(noinline=True)
def list_slots(memory, shape: tl.constexpr):
    """Replicas of every expert, and lists of their slots: memory.link [E + P] names the first slot of each expert, then
    the next slot of the same expert after each slot; -1 ends a list. All GPUs to memory.changed."""
    E: tl.constexpr = shape.experts
    start = 0
    while start < E:
        expert = start + tl.arange(0, shape.lanes)
        inside = expert < E
        count = tl.zeros((shape.lanes,), tl.int32)
        link = expert
        for slot in tl.range(0, shape.replicas, loop_unroll_factor=4):
            here = inside & (tl.load(memory.ints + shape.at.slot + slot) == expert)
            tl.store(memory.ints + shape.at.link + link, slot, mask=here)
            link = tl.where(here, E + slot, link)
            count += here.to(tl.int32)
        tl.store(memory.ints + shape.at.link + link, -1, mask=inside)
        tl.store(memory.ints + shape.at.count + expert, count, mask=inside)
        start += shape.lanes
    gpu = tl.arange(0, shape.gpu_lanes)
    tl.store(memory.ints + shape.at.changed + gpu, gpu, mask=gpu < shape.gpus)
    tl.debug_barrier()
