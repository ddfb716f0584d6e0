"""Relabelling: the same plan with its nodes, GPUs and slots renumbered, so that experts stay where they are.

A program of its own for a plan that is made, one a layer; and, of the GPUs alone, a stage of replanning. Either has a
`memory` with int32 arrays that lie where its `shape.at` says.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from eplb_triton.kernels.replanning_slots import list_slots, write_maps


class Scratch(NamedTuple):
    """Of all layers on the host, of one layer in the kernel. What lies where is said by `Places`."""

    ints: Any  # int32 [L, num_ints]


@triton.jit(do_not_specialize=["before_ptr", "log2phy_layer_stride", "log2phy_stride"])
def relabel_layers(
    before_ptr,  # integer [L, P], contiguous, expert in each slot in force; -1: none
    log2phy_layer_stride: tl.int64,
    log2phy_stride: tl.int64,  # of an expert
    scratch,  # Scratch
    maps,  # Maps: of a plan, and then of that plan relabelled, its replicas ranked by slot
    shape: tl.constexpr,  # RelabelShape
):
    layer = tl.program_id(0).to(tl.int64)
    memory = Scratch(scratch.ints + layer * shape.num_ints)
    _read_slots(before_ptr + layer * shape.replicas, memory.ints + shape.at.before, shape)
    _read_slots(maps.phy2log + layer * shape.replicas, memory.ints + shape.at.slot, shape)
    tl.debug_barrier()
    if shape.nodes > 1:
        relabel_nodes(memory, maps.bad + layer * shape.nodes, shape)
    relabel_gpus(memory, shape)
    list_slots(memory, shape)
    one = tl.full((), 1, tl.int32)
    write_maps(memory, one, layer, maps, log2phy_layer_stride, log2phy_stride, shape)


@triton.jit
def _read_slots(slots_ptr, to_ptr, shape: tl.constexpr):
    """The layer's slots as int32 [P]; what is no expert counts as an empty slot."""
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        expert = tl.load(slots_ptr + slot, mask=inside, other=0)
        known = (expert >= 0) & (expert < shape.experts)
        tl.store(to_ptr + slot, tl.where(known, expert, -1).to(tl.int32), mask=inside)
        start += shape.lanes


@triton.jit(noinline=True)
def relabel_nodes(memory, bad_ptr, shape: tl.constexpr):
    """memory.slot, a plan: its nodes, and their rows of `bad` [N], get the numbers of those of memory.before that share
    most replicas with them.

    Ties: the lowest node before, then the lowest of the plan."""
    P: tl.constexpr = shape.replicas // shape.nodes
    _count_shared(memory, shape.nodes, 1, shape)
    _pair_packs(memory, shape.nodes, 1, shape)
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        node = tl.load(memory.ints + shape.at.partner + slot // P, mask=inside, other=0)
        expert = tl.load(memory.ints + shape.at.slot + node * P + slot % P, mask=inside, other=0)
        tl.store(memory.ints + shape.at.placed + slot, expert, mask=inside)
        start += shape.lanes
    node = tl.arange(0, shape.gpu_lanes)
    inside = node < shape.nodes
    bad = tl.load(bad_ptr + tl.load(memory.ints + shape.at.partner + node, mask=inside, other=0), mask=inside, other=0)
    tl.debug_barrier()
    tl.store(bad_ptr + node, bad, mask=inside)
    _take_placed(memory, shape)


@triton.jit(noinline=True)
def relabel_gpus(memory, shape: tl.constexpr):
    """memory.slot, a plan, becomes one that writes few slots of memory.before: in every node GPUs are paired by the
    replicas they share, most first; kept experts stay in their slots, the others fill the free ones in their order.

    Ties: the lowest GPU before, then the lowest of the plan; of equal experts, the lowest slots are kept."""
    _count_shared(memory, shape.gpus, shape.nodes, shape)
    _pair_packs(memory, shape.gpus, shape.nodes, shape)
    _place(memory, shape)


@triton.jit
def _count_shared(memory, PACKS: tl.constexpr, ROWS: tl.constexpr, shape: tl.constexpr):
    """memory.shared [PACKS, PACKS / ROWS]: replicas that each pack before and each pack of the plan have in common, for
    packs of one of the ROWS that the packs lie in."""
    P: tl.constexpr = shape.replicas
    SIZE: tl.constexpr = P // PACKS
    D: tl.constexpr = PACKS // ROWS
    start = 0
    while start < PACKS * D:
        pair = start + tl.arange(0, shape.lanes)
        tl.store(memory.ints + shape.at.shared + pair, tl.zeros_like(pair), mask=pair < PACKS * D)
        start += shape.lanes
    start = 0
    while start < P:  # memory.rank: how many lower slots of its pack hold the same expert
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < P
        expert = tl.load(memory.ints + shape.at.slot + slot, mask=inside, other=-1)
        rank = tl.zeros_like(slot)
        for i in tl.range(0, SIZE):
            its_pack = memory.ints + shape.at.slot + slot // SIZE * SIZE
            lower = tl.load(its_pack + i, mask=inside & (i < slot % SIZE), other=-2)
            rank += (lower == expert).to(tl.int32)
        tl.store(memory.ints + shape.at.rank + slot, rank, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < D * P:  # every slot of the plan beside every pack before of its row
        at = start + tl.arange(0, shape.lanes)
        inside = at < D * P
        new = at % P // SIZE
        old = new // D * D + at // P
        expert = tl.load(memory.ints + shape.at.slot + at % P, mask=inside, other=-1)
        left = -tl.load(memory.ints + shape.at.rank + at % P, mask=inside, other=0)
        for i in tl.range(0, SIZE):
            before = tl.load(memory.ints + shape.at.before + old * SIZE + i, mask=inside, other=-2)
            left += (before == expert).to(tl.int32)
        shared = memory.ints + shape.at.shared + old * D + new % D
        tl.atomic_add(shared, 1, mask=inside & (expert >= 0) & (left > 0), sem="relaxed")
        start += shape.lanes
    tl.debug_barrier()


@triton.jit
def _pair_packs(memory, PACKS: tl.constexpr, ROWS: tl.constexpr, shape: tl.constexpr):
    """memory.partner: the pack of the plan that each pack before becomes, of most shared replicas first.

    The key of a pack before, the largest of which is the next pair: replicas shared with its best partner, then its own
    number and the partner's, the lowest highest; then whether that partner has gone to another since. Then the pack
    looks again when its turn comes. Below 2 * (P + D) * D, a key is far from 2^31."""
    D: tl.constexpr = PACKS // ROWS
    pack = tl.arange(0, shape.gpu_lanes)
    inside = pack < PACKS
    best = tl.zeros_like(pack)
    for partner in tl.range(0, D):
        shared = tl.load(memory.ints + shape.at.shared + pack * D + partner, mask=inside, other=0)
        best = tl.maximum(best, shared * D + (D - 1 - partner))
    key = tl.where(inside, _key_of(best, pack, PACKS, D), -1)
    partners = tl.zeros_like(pack)
    free = inside
    top = tl.max(key, 0)
    while top >= 2 * D * PACKS:  # some replica is shared
        old = PACKS - 1 - top // (2 * D) % PACKS
        mine = pack == old
        row = pack // D == old // D
        if top % 2 == 0:
            new = old // D * D + (D - 1 - top // 2 % D)
            partners = tl.where(mine, new, partners)
            free = free & (pack != new)
            gone = row & (key >= 0) & (key // 2 % D == top // 2 % D)
            key = tl.where(mine, -1, tl.where(gone, key | 1, key))
        else:
            there = row & free
            shared = tl.load(memory.ints + shape.at.shared + old * D + pack % D, mask=there, other=0)
            again = tl.max(tl.where(there, shared * D + (D - 1 - pack % D), 0), 0)
            key = tl.where(mine, _key_of(again, old, PACKS, D), key)
        top = tl.max(key, 0)
    # What shares nothing with any that is left, in order: as many of each row before as of the plan's.
    place = tl.cumsum(free.to(tl.int32), 0) - 1
    tl.store(memory.ints + shape.at.order + place, pack, mask=free)
    tl.debug_barrier()
    left = key >= 0
    place = tl.cumsum(left.to(tl.int32), 0) - 1
    partners = tl.where(left, tl.load(memory.ints + shape.at.order + place, mask=left, other=0), partners)
    tl.store(memory.ints + shape.at.partner + pack, partners, mask=inside)
    tl.debug_barrier()


@triton.jit
def _key_of(best, pack, PACKS: tl.constexpr, D: tl.constexpr):
    """A key of `_pair_packs`; best: shared * D + D - 1 - partner."""
    return 2 * ((best // D * PACKS + (PACKS - 1 - pack)) * D + best % D)


@triton.jit
def _place(memory, shape: tl.constexpr):
    """memory.slot: kept experts in their old slots, the others in the free ones."""
    S: tl.constexpr = shape.slots
    # memory.kept: of slots before, then of slots of the plan, as of the GPU that it becomes
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        old = slot // S * S
        new = tl.load(memory.ints + shape.at.partner + slot // S, mask=inside, other=0) * S
        stays = _spare(memory.ints + shape.at.before + old, memory.ints + shape.at.slot + new, slot % S, inside, S)
        wanted = _spare(memory.ints + shape.at.slot + new, memory.ints + shape.at.before + old, slot % S, inside, S)
        tl.store(memory.ints + shape.at.kept + slot, stays, mask=inside)
        tl.store(memory.ints + shape.at.kept + shape.replicas + slot, wanted, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        old = slot // S * S
        new = tl.load(memory.ints + shape.at.partner + slot // S, mask=inside, other=0) * S
        nth = tl.zeros_like(slot)  # of its GPU's free slots
        for i in tl.range(0, S):
            kept = tl.load(memory.ints + shape.at.kept + old + i, mask=inside & (i < slot % S), other=1)
            nth += 1 - kept
        expert = tl.load(memory.ints + shape.at.before + slot, mask=inside, other=0)
        free = inside & (tl.load(memory.ints + shape.at.kept + slot, mask=inside, other=1) == 0)
        for j in tl.range(0, S):
            coming = free & (tl.load(memory.ints + shape.at.kept + shape.replicas + old + j, mask=inside, other=1) == 0)
            its_expert = tl.load(memory.ints + shape.at.slot + new + j, mask=coming, other=0)
            expert = tl.where(coming & (nth == 0), its_expert, expert)
            nth -= coming.to(tl.int32)
        tl.store(memory.ints + shape.at.placed + slot, expert, mask=inside)
        start += shape.lanes
    _take_placed(memory, shape)


@triton.jit
def _take_placed(memory, shape: tl.constexpr):
    """memory.placed becomes memory.slot."""
    tl.debug_barrier()
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        expert = tl.load(memory.ints + shape.at.placed + slot, mask=slot < shape.replicas, other=0)
        tl.store(memory.ints + shape.at.slot + slot, expert, mask=slot < shape.replicas)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit
def _spare(mine_ptr, theirs_ptr, slot, inside, S: tl.constexpr):
    """Whether the other GPU has a replica for this slot's, after those for the lower slots of its expert: int32."""
    expert = tl.load(mine_ptr + slot, mask=inside, other=-1)
    left = expert * 0
    for i in tl.range(0, S):
        left += (tl.load(theirs_ptr + i, mask=inside, other=-2) == expert).to(tl.int32)
        left -= (tl.load(mine_ptr + i, mask=inside & (i < slot), other=-2) == expert).to(tl.int32)
    return (left > 0).to(tl.int32)
