"""Replanning, lists: the slots of every expert, and the maps that follow from them."""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(4)
"""Slots of an expert that a lane looks up before it asks whether there are more."""


@triton.jit(noinline=True)
def list_slots(memory, shape: tl.constexpr):
    """Of every expert, from memory.slot: memory.count, its replicas, and memory.link [E + P], a list of its slots,
    ascending: the first slot of each expert, then the next one after each slot; -1 ends a list. memory.last: its last
    slot."""
    E: tl.constexpr = shape.experts
    P: tl.constexpr = shape.replicas
    links, counts_ptr = memory.ints + shape.at.link, memory.ints + shape.at.count
    each = tl.arange(0, shape.expert_lanes)
    tl.store(counts_ptr + each, tl.zeros_like(each), mask=each < E)
    tl.debug_barrier()
    slot = tl.arange(0, shape.replica_lanes)
    expert = tl.load(memory.ints + shape.at.slot + slot, mask=slot < P, other=-1)
    held = expert >= 0
    nth = tl.atomic_add(counts_ptr + expert, 1, mask=held, sem="relaxed")  # as they come; the lists are in order
    tl.debug_barrier()
    count = tl.load(counts_ptr + each, mask=each < E, other=0)
    first = tl.cumsum(count, 0) - count
    most = tl.max(count, 0)
    tl.store(memory.ints + shape.at.first + each, first, mask=each < E)
    tl.store(links + each, tl.zeros_like(each) - 1, mask=(each < E) & (count == 0))
    tl.debug_barrier()
    count = tl.load(counts_ptr + expert, mask=held, other=0)
    its_first = tl.load(memory.ints + shape.at.first + expert, mask=held, other=0)
    its_first = memory.ints + shape.at.listed + its_first
    tl.store(its_first + nth, slot, mask=held)
    tl.debug_barrier()
    before, after = slot * 0 - 1, slot * 0 + P
    n = 0
    while n < most:
        for _ in tl.static_range(AT_ONCE):
            other = tl.load(its_first + n, mask=n < count, other=-1)
            before = tl.where(other < slot, tl.maximum(before, other), before)
            after = tl.where(other > slot, tl.minimum(after, other), after)
            n += 1
    tl.store(links + tl.where(before < 0, expert, E + before), slot, mask=held)
    last = held & (after == P)
    tl.store(links + E + slot, slot * 0 - 1, mask=last)
    tl.store(memory.ints + shape.at.last + expert, slot, mask=last)
    tl.debug_barrier()


@triton.jit(noinline=True)
def write_maps(memory, plans, layer, out, layer_stride, expert_stride, shape: tl.constexpr):
    """The layer's maps from memory.slot and the lists of it, ranks ascending with the slot; a slot without an expert
    has none. Where no plan was made, phy2log stands already. The strides are those of log2phy, which holds the replicas
    of lowest rank: where an expert has more, each -1 of `bad` becomes -2."""
    E: tl.constexpr = shape.experts
    WIDTH: tl.constexpr = shape.log2phy_width
    log2phy = out.log2phy
    if log2phy is not None:
        log2phy += layer * layer_stride
    most = tl.full((), 0, tl.int32)
    start = 0
    while start < E:
        expert = start + tl.arange(0, shape.lanes)
        count = tl.load(memory.ints + shape.at.count + expert, mask=expert < E, other=0)
        tl.store(out.logcnt + layer * E + expert, count, mask=expert < E)
        most = tl.maximum(most, tl.max(count, 0))
        start += shape.lanes
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        at = layer * shape.replicas + slot
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=-1)
        rank = _rank(memory, slot, expert, most, shape)
        if plans > 0:
            tl.store(out.phy2log + at, expert, mask=inside)
        tl.store(out.phyrank + at, rank, mask=inside)
        if log2phy is not None:
            tl.store(log2phy + expert * expert_stride + rank, slot, mask=(rank >= 0) & (rank < WIDTH))
        start += shape.lanes
    if log2phy is not None:
        start = 0
        while start < E * WIDTH:
            at = start + tl.arange(0, shape.lanes)
            inside = at < E * WIDTH
            count = tl.load(memory.ints + shape.at.count + at // WIDTH, mask=inside, other=0)
            padded = inside & (at % WIDTH >= count)
            tl.store(log2phy + at // WIDTH * expert_stride + at % WIDTH, at * 0 - 1, mask=padded)
            start += shape.lanes
        if shape.replicas - E >= WIDTH:
            node = tl.arange(0, shape.gpu_lanes)
            inside = node < shape.nodes
            bad = tl.load(out.bad + layer * shape.nodes + node, mask=inside, other=0)
            tl.debug_barrier()
            crowded = (most > WIDTH) & (bad == -1)
            tl.store(out.bad + layer * shape.nodes + node, tl.where(crowded, -2, bad), mask=inside)


@triton.jit
def _rank(memory, slot, expert, most, shape: tl.constexpr):
    """Of slots [lanes] among those of their expert, from its list, which is in any order; -1 of no expert.

    most: no expert has more slots."""
    links = memory.ints + shape.at.link
    rank = tl.where(expert >= 0, 0, -1)
    other = tl.load(links + expert, mask=expert >= 0, other=-1)
    nth = 0
    while nth < most:
        for _ in tl.static_range(AT_ONCE):
            rank += ((other >= 0) & (other < slot)).to(tl.int32)
            other = tl.load(links + shape.experts + other, mask=other >= 0, other=-1)
        nth += AT_ONCE
    return rank
