"""Replanning, one step: the swap or the new replica that lowers the potential most for each slot it writes.

Swaps are bounded by inner products over the samples: of a GPU that gives a and takes b, T * Q - M^2 + U is what it was,
plus terms of a, of b and of the pair. They are made once a step, a bound takes a few additions. Float32 will do, as the
products are of loads less their mean: none is above the spreads of its two experts, and so is what it is off by.
"""
# ruff: noqa: N803, N806, RUF005
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,assignment"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import divide
from eplb_triton.kernels.replanning_potential import TOO_MUCH, add_product, below, floats_of, sample_rows


@triton.jit(noinline=True)
def multiply_own(memory, samples, heaviest, shape: tl.constexpr):
    """What swaps of the heaviest GPU h are bounded by: float32 numbers.

    memory.product [S, E]: 2 (T * sum of products - product of sums) of each slot of h with each expert of its node. By
    expert, memory.into_own: what b adds to h, or less, TOO_MUCH where h holds it. By i and GPU o, memory.into_partner:
    what a adds to o, or less, TOO_MUCH where o holds it, and memory.held_at, the lowest slot of o that holds a, else
    -1."""
    S: tl.constexpr = shape.slots
    OF_NODE: tl.constexpr = shape.experts // shape.nodes
    ROOM: tl.constexpr = shape.lanes // OF_NODE if shape.lanes > OF_NODE else 1
    PARTS: tl.constexpr = S if S < ROOM else ROOM  # of the slots of h, side by side
    twice = divide(2.0, samples)
    own_spread = tl.load(memory.longs + shape.at.gpu_spread + heaviest).to(tl.float32)
    start = 0
    while start < PARTS * OF_NODE:
        at = tl.minimum(start + tl.arange(0, shape.lanes), PARTS * OF_NODE - 1)
        _multiply_tile(memory, twice, heaviest, own_spread, at, PARTS, shape)
        start += shape.lanes
    tl.debug_barrier()
    if PARTS > 1:
        _add_up_products(memory, heaviest, own_spread, shape)
    _add_to_partners(memory, heaviest, shape)


@triton.jit
def _multiply_tile(memory, twice, heaviest, own_spread, at, PARTS: tl.constexpr, shape: tl.constexpr):
    """memory.product, and, if a lane does all slots of h, memory.into_own: each lane an expert and a part of the slots.

    A function, since Triton's front end goes through the body of a loop once for each loop that it is in, and once
    more."""
    ROW: tl.constexpr = shape.row
    STEP: tl.constexpr = shape.together
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    OF_NODE: tl.constexpr = E // shape.nodes
    EACH: tl.constexpr = (S + PARTS - 1) // PARTS
    # with a row of b's samples in registers; 9 at once take 2 % of a step less, and 7 % more to compile
    AT_ONCE: tl.constexpr = EACH if EACH < 3 else 3
    floats = floats_of(memory)
    node, own_slot = heaviest // (shape.gpus // shape.nodes), heaviest * S
    first = at // OF_NODE * EACH
    b = expert_of_node(memory, node, at % OF_NODE, shape)
    spread = tl.load(memory.longs + shape.at.spread + b).to(tl.float32)
    row_ptr = sample_rows(floats + shape.at.centred, b, shape)
    row = ()
    for t in tl.static_range(0, ROW, STEP):
        row = row + (tl.load(row_ptr + t * E),)
    added = tl.full((shape.lanes,), 0.0, tl.float32)
    held = at < 0
    for nth in tl.range(0, EACH, AT_ONCE):
        made = ()
        for also in tl.static_range(AT_ONCE):  # all before the first is stored: no load passes a store
            a = tl.load(memory.ints + shape.at.slot + own_slot + tl.minimum(first + nth + also, S - 1))
            own_ptr = sample_rows(floats + shape.at.centred, a, shape)
            products = tl.full((shape.lanes, STEP), 0.0, tl.float32)
            for t in tl.static_range(0, ROW, STEP):
                products = add_product(products, row[t // STEP], tl.load(own_ptr + t * E))
            product = tl.sum(products, 1) * twice
            made = made + (product,)
            added += tl.where(nth + also < EACH, product, 0.0)
            held = held | (a == b)
        for also in tl.static_range(AT_ONCE):
            i = first + nth + also
            mine = (i < S) & (nth + also < EACH)
            tl.store(floats + shape.at.product + i * E + b, made[also], mask=mine)
    if PARTS == 1:
        _store_into_own(memory, b, held, added, spread, own_spread, shape)


@triton.jit
def _add_up_products(memory, heaviest, own_spread, shape: tl.constexpr):
    """memory.into_own of `multiply_own`, from memory.product. A loop that never runs, where a lane has done all of an
    expert, is none that Triton 3.6 compiles."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    OF_NODE: tl.constexpr = E // shape.nodes
    floats = floats_of(memory)
    start = 0
    while start < OF_NODE:
        at = tl.minimum(start + tl.arange(0, shape.lanes), OF_NODE - 1)
        b = expert_of_node(memory, heaviest // D, at, shape)
        added = tl.full((shape.lanes,), 0.0, tl.float32)
        held = at < 0
        spread = tl.load(memory.longs + shape.at.spread + b).to(tl.float32)
        for i in tl.range(0, S, loop_unroll_factor=3):
            added += tl.load(floats + shape.at.product + i * E + b)
            held = held | (tl.load(memory.ints + shape.at.slot + heaviest * S + i) == b)
        _store_into_own(memory, b, held, added, spread, own_spread, shape)
        start += shape.lanes


@triton.jit
def _store_into_own(memory, b, held, added, spread, own_spread, shape: tl.constexpr):
    near = _added_below(added, spread, own_spread, shape)
    tl.store(floats_of(memory) + shape.at.into_own + b, tl.where(held, TOO_MUCH, near))


@triton.jit
def _added_below(products, spread, gpu_spread, shape: tl.constexpr):
    """`below` of what an expert adds to a GPU: twice its own spread, and its products with all that the GPU holds."""
    return below(products + 2.0 * spread, gpu_spread + (shape.slots + 3.0) * spread, shape)


@triton.jit(noinline=True)
def _add_to_partners(memory, heaviest, shape: tl.constexpr):
    """memory.into_partner and memory.held_at of `multiply_own`, from memory.product."""
    S: tl.constexpr = shape.slots
    E: tl.constexpr = shape.experts
    D: tl.constexpr = shape.gpus // shape.nodes
    PARTS: tl.constexpr = shape.partner_parts
    floats = floats_of(memory)
    first_gpu = heaviest // D * D
    i = tl.arange(0, shape.partner_rows)[:, None] * PARTS
    start = 0
    while start < PARTS * D:
        at = start + tl.arange(0, shape.lanes)
        inside = at < PARTS * D
        at = tl.minimum(at, PARTS * D - 1)
        gpu, part = at % D, at // D
        own = i + part[None, :]
        mine = (own < S) & inside[None, :]
        own = tl.minimum(own, S - 1)
        a = tl.load(memory.ints + shape.at.slot + heaviest * S + own)
        spread = tl.load(memory.longs + shape.at.spread + a).to(tl.float32)
        its_spread = tl.load(memory.longs + shape.at.gpu_spread + first_gpu + gpu).to(tl.float32)[None, :]
        added = tl.full((shape.partner_rows, shape.lanes), 0.0, tl.float32)
        held_at = tl.full((shape.partner_rows, shape.lanes), -1, tl.int32)
        slot = (first_gpu + gpu) * S
        slot_ptr, product_ptr = memory.ints + shape.at.slot + slot, floats + shape.at.product + own * E
        for back in tl.range(1, S + 1, loop_unroll_factor=3):  # the lowest slot comes last
            b = tl.load(slot_ptr + (S - back))[None, :]
            added += tl.load(product_ptr + b)
            held_at = tl.where(b == a, slot[None, :] + (S - back), held_at)
        near = _added_below(added, spread, its_spread, shape)
        place = own * D + gpu[None, :]
        tl.store(floats + shape.at.into_partner + place, tl.where(held_at >= 0, TOO_MUCH, near), mask=mine)
        tl.store(memory.ints + shape.at.held_at + place, held_at, mask=mine)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit
def expert_of_node(memory, node, place, shape: tl.constexpr):
    """The experts of a node by their places [lanes]."""
    expert = place
    if shape.nodes > 1:
        expert = tl.load(memory.ints + shape.at.node_expert + node * (shape.experts // shape.nodes) + place)
    return expert


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
    donor_own = tl.load(memory.ints + shape.at.donor_at + own)
    donor_other = tl.load(memory.ints + shape.at.donor_at + other)
    tl.debug_barrier()
    tl.store(memory.ints + shape.at.donor_at + own, donor_other)
    tl.store(memory.ints + shape.at.donor_at + other, donor_own)
    tl.store(memory.ints + shape.at.donor + donor_own, other, mask=donor_own >= 0)
    tl.store(memory.ints + shape.at.donor + donor_other, own, mask=donor_other >= 0)
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
def add_replica(memory, heaviest, key, shape: tl.constexpr):
    """Make the new replica of a key of `find_replica`, in the donor's lowest slot on the receiving GPU.

    Returns receiver, donor and how many GPUs, those that hold either, are in memory.changed."""
    E: tl.constexpr = shape.experts
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    links = memory.ints + shape.at.link
    own_slot = heaviest * S + key // (E * D)
    a = tl.load(memory.ints + shape.at.slot + own_slot)
    b = key // D % E
    gpu = heaviest // D * D + key % D
    link = b
    slot = tl.load(links + b)
    while (slot // S != gpu) | (tl.load(memory.ints + shape.at.times + slot) == 0):
        link = E + slot
        slot = tl.load(links + link)
    after, first = tl.load(links + E + slot), tl.load(links + a)
    count_a = tl.load(memory.ints + shape.at.count + a)
    count_b = tl.load(memory.ints + shape.at.count + b)
    a_first = tl.load(memory.ints + shape.at.donor_first + a)
    b_first = tl.load(memory.ints + shape.at.donor_first + b)
    num = count_a + count_b
    start = 0
    while start < num:
        at = start + tl.arange(0, shape.lanes)
        place = tl.where(at < count_a, a_first + at, b_first + at - count_a)
        alone = (at < count_a) & (count_a == 1)  # no donor
        holder = tl.load(memory.ints + shape.at.donor + place, mask=(at < num) & (alone == 0), other=0)
        holder = tl.where(alone, own_slot, holder)
        tl.store(memory.ints + shape.at.changed + at, holder // S, mask=at < num)
        start += shape.lanes
    tl.debug_barrier()
    tl.store(memory.ints + shape.at.slot + slot, a)
    tl.store(links + link, after)
    tl.store(links + a, slot)
    tl.store(links + E + slot, first)
    tl.store(memory.ints + shape.at.count + a, count_a + 1)
    tl.store(memory.ints + shape.at.count + b, count_b - 1)
    tl.debug_barrier()
    return a, b, num
