"""Splitting: how many of an expert's tokens each of its replicas gets; one program a layer.

A *place* of an expert is a slot of it on a GPU that holds no lower slot of it. Experts of one class share no GPU, so a
class is at most one place a GPU: its experts are levelled side by side, a lane for every GPU.
"""
# ruff: noqa: N803, N806, SIM108
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, bits, from_bits, lowest_free
from eplb_triton.kernels.fixed import power_of_two
from eplb_triton.kernels.splitting_levels import (
    FEW,
    HELD_COUNT,
    HELD_FIRST,
    HELD_LABEL,
    HELD_NEAR,
    HELD_NTH,
    HELD_OTHERS,
    HELD_QUOTA,
    HELD_SLOT,
    NEAR,
    level_few,
    level_many,
    next_place,
    quarter_at_most,
)

TOTAL_BITS = tl.constexpr(23)  # of float loads in fixed point: E of them stay below 2^24
WORD = tl.constexpr(32)  # classes in a word of a mask


@triton.jit
def place_classes(
    phy2log_ptr,  # integer [NUM_GPUS * SLOTS], expert in each slot of the row, -1 where there is none
    logical_ptr,  # int32 [NUM_EXPERTS], logical expert of each row expert; None: the same
    number_ptr,  # integer [NUM_EXPERTS], slots of each row expert
    masks_ptr,  # int32 [ceil(NUM_EXPERTS / 32), GPUS], scratch
    classes_ptr,  # int32 [E], out, those of the row's experts
    NUM_EXPERTS: tl.constexpr,
    NUM_GPUS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    GPUS: tl.constexpr,
):
    """Experts of at least two places, in order of their logical index, take the lowest class none of whose experts
    uses one of their GPUs; the others -1. A row may be a layer, or a node of it where experts stay on their node."""
    row_expert = tl.arange(0, EXPERTS)
    inside = row_expert < NUM_EXPERTS
    logical = row_expert
    if logical_ptr is not None:
        logical = tl.load(logical_ptr + row_expert, mask=inside, other=0)
    tl.store(classes_ptr + logical, tl.zeros_like(row_expert) - 1, mask=inside)
    tl.debug_barrier()
    number = tl.load(number_ptr + row_expert, mask=inside, other=0)
    left = tl.where(inside & (number > 1), logical, HIGHEST)
    gpu = tl.arange(0, GPUS)
    for word in tl.range(0, (NUM_EXPERTS + WORD - 1) // WORD):
        tl.store(masks_ptr + word * GPUS + gpu, tl.zeros_like(gpu))
    tl.debug_barrier()
    expert = tl.min(left, 0)
    while expert < HIGHEST:
        holds = gpu < 0
        for within in tl.range(0, SLOTS):
            held = tl.load(phy2log_ptr + gpu * SLOTS + within, mask=gpu < NUM_GPUS, other=-1)
            holds = holds | (held == expert)
        several = tl.sum(holds.to(tl.int32), 0) > 1
        word_ptr = masks_ptr + gpu
        mask = tl.load(word_ptr)
        bit = lowest_free(tl.where(holds, mask, 0))
        base = 0
        while bit == WORD:  # all classes of this word are used
            base += WORD
            word_ptr += GPUS
            mask = tl.load(word_ptr)
            bit = lowest_free(tl.where(holds, mask, 0))
        if several:
            tl.store(word_ptr, mask | (1 << bit), mask=holds)
            tl.store(classes_ptr + expert, base + bit)
        left = tl.where(left == expert, HIGHEST, left)
        expert = tl.min(left, 0)


@triton.jit
def whole_counts(
    loads,  # float32 [EXPERTS], at least 0; 0 beyond NUM_EXPERTS
    NUM_EXPERTS: tl.constexpr,
):
    """int32 [EXPERTS]: loads times a power of two, cut to whole numbers that add up to less than 2^24; and the
    exponent, int64, 0 for an idle layer."""
    largest = from_bits(tl.max(bits(loads), 0)).to(tl.float64)
    floor = (largest.to(tl.int64, bitcast=True) >> 52) - 1023
    scale = -floor + TOTAL_BITS
    width = 1
    while width < NUM_EXPERTS:
        width += width
        scale -= 1
    scale = tl.where(largest == 0, 0, scale)
    return (loads.to(tl.float64) * power_of_two(scale)).to(tl.int32), scale


@triton.jit
def split_counts(
    phy2log_ptr,  # integer [P], expert in each slot, -1 where there is none
    classes_ptr,  # int32 [E], from `place_classes`
    counts_ptr,  # int32 [E], tokens of each expert, their sum below 2^31
    rounds,
    quotas_ptr,  # int32 [P], out
    scratch,  # SplitScratch
    shape: tl.constexpr,  # SplitShape
):
    """Quotas: the counts split evenly over the places of each expert, then levelled by `rounds` over all classes; a
    round that changes nothing ends them. Ties: lowest slot."""
    num_classes = _list_places(phy2log_ptr, classes_ptr, counts_ptr, quotas_ptr, scratch, shape)
    gpu = tl.arange(0, shape.gpus)
    inside = gpu < shape.num_gpus
    load = tl.zeros_like(gpu)
    held = tl.zeros_like(gpu)  # places with a class on each GPU
    for within in tl.range(0, shape.slots):
        slot = gpu * shape.slots + within
        load += tl.load(quotas_ptr + slot, mask=inside, other=0)
        held += (tl.load(scratch.label + slot, mask=inside, other=-1) >= 0).to(tl.int32)
    tl.debug_barrier()
    turn = 0
    changed = 1
    while (turn < rounds) & (changed != 0):
        changes = tl.zeros_like(gpu)
        cursor = tl.zeros_like(gpu)
        place = next_place(cursor, held, turn & 1, scratch, shape)
        number = 0
        while number < num_classes:
            mine = place.label == number
            at = scratch.held + cursor * shape.num_gpus + gpu
            cursor += mine.to(tl.int32)
            following = next_place(cursor, held, turn & 1, scratch, shape)  # under way while this class is levelled
            b = load - tl.where(mine, place.quota, 0)
            others = tl.where(mine, place.others, 0)
            most = tl.max(others, 0)
            if most <= FEW:
                fresh = level_few(b, place, others, mine)
            else:
                fresh = level_many(b, place, others, most, mine, at, scratch, shape.num_replicas)
            tl.store(at + (HELD_QUOTA + 1 - (turn & 1)) * shape.num_replicas, fresh, mask=mine)
            load = b + fresh
            changes = changes | tl.where(mine, fresh ^ place.quota, 0)
            place = following
            number += 1
        changed = tl.max((changes != 0).to(tl.int32), 0)
        turn += 1
        tl.debug_barrier()  # a tile of GPUs smaller than the program is kept by every warp, and stored by one
    most = tl.max(held, 0)
    at = 0
    while at < most:
        place = at * shape.num_gpus + gpu
        slot = tl.load(scratch.held + HELD_SLOT * shape.num_replicas + place, mask=at < held, other=0)
        quota_ptr = scratch.held + (HELD_QUOTA + (turn & 1)) * shape.num_replicas
        quota = tl.load(quota_ptr + place, mask=at < held, other=0)
        tl.store(quotas_ptr + slot, quota, mask=at < held)
        at += 1


@triton.jit
def _mark_places(phy2log_ptr, classes_ptr, counts_ptr, quotas_ptr, scratch, shape: tl.constexpr):
    """The expert of every slot, its class (-1: none, or the slot is no place), and which of its places it is; also the
    number of places of each expert, and the quotas of those without a class."""
    SLOTS: tl.constexpr = shape.slots
    expert = tl.arange(0, shape.experts)
    tl.store(scratch.number + expert, tl.zeros_like(expert), mask=expert < shape.num_experts)
    tl.debug_barrier()
    slot = tl.arange(0, shape.replicas)
    there = slot < shape.num_replicas
    within = slot % SLOTS
    owner = tl.load(phy2log_ptr + slot, mask=there, other=-1).to(tl.int32)
    place = owner >= 0
    for back in tl.range(1, SLOTS):
        lower = tl.load(phy2log_ptr + slot - back, mask=there & (within >= back), other=-1).to(tl.int32)
        place = place & (lower != owner)
    label = tl.load(classes_ptr + owner, mask=place, other=-1)
    shared = label >= 0
    tl.store(scratch.label + slot, label, mask=there)
    alone = tl.load(counts_ptr + owner, mask=place & (label < 0), other=0)
    tl.store(quotas_ptr + slot, alone, mask=there & (label < 0))
    # Which place comes first in `gpus` differs from run to run; nothing depends on it.
    nth = tl.atomic_add(scratch.number + owner, 1, mask=shared, sem="relaxed")
    tl.debug_barrier()
    return owner, label, nth


@triton.jit
def _list_places(phy2log_ptr, classes_ptr, counts_ptr, quotas_ptr, scratch, shape: tl.constexpr):
    """Fill the scratch of a layer, and the quotas with the even split; the number of classes."""
    SLOTS: tl.constexpr = shape.slots
    owner, label, nth = _mark_places(phy2log_ptr, classes_ptr, counts_ptr, quotas_ptr, scratch, shape)
    expert = tl.arange(0, shape.experts)
    slot = tl.arange(0, shape.replicas)
    there = slot < shape.num_replicas
    gpu = slot // SLOTS
    shared = label >= 0
    places = tl.load(scratch.number + expert, mask=expert < shape.num_experts, other=0)
    tl.store(scratch.first + expert, tl.cumsum(places, 0) - places, mask=expert < shape.num_experts)
    tl.debug_barrier()
    first = tl.load(scratch.first + owner, mask=shared, other=0)
    number = tl.load(scratch.number + owner, mask=shared, other=0)
    tl.store(scratch.gpus + first + nth, gpu, mask=shared)
    tl.debug_barrier()
    before = tl.zeros_like(slot)
    for other in tl.range(0, SLOTS):
        label_there = tl.load(scratch.label + gpu * SLOTS + other, mask=there, other=-1)
        before += ((label_there >= 0) & (label_there < label)).to(tl.int32)
    P: tl.constexpr = shape.num_replicas
    held_ptr = scratch.held + before * shape.num_gpus + gpu
    most = tl.max(number, 0)
    lower = tl.zeros_like(slot)
    i = 0
    while i < tl.maximum(most - 1, FEW):
        near = tl.load(scratch.gpus + first + i + (i >= nth).to(tl.int32), mask=i + 1 < number, other=0)
        near = tl.where(i + 1 < number, near, gpu)
        lower += (near < gpu).to(tl.int32)
        if i < NEAR:
            tl.store(held_ptr + (HELD_NEAR + i) * P, near, mask=shared)
        i += 1
    count = tl.load(counts_ptr + owner, mask=shared, other=0)
    if most <= FEW + 1:
        each = quarter_at_most(count, number)
    else:
        each = count // tl.maximum(number, 1)
    quota = each + (lower < count - each * number).to(tl.int32)
    tl.store(quotas_ptr + slot, quota, mask=shared)
    tl.store(held_ptr + HELD_LABEL * P, label, mask=shared)
    tl.store(held_ptr + HELD_SLOT * P, slot, mask=shared)
    tl.store(held_ptr + HELD_QUOTA * P, quota, mask=shared)
    tl.store(held_ptr + HELD_COUNT * P, count, mask=shared)
    tl.store(held_ptr + HELD_OTHERS * P, number - 1, mask=shared)
    tl.store(held_ptr + HELD_FIRST * P, first, mask=shared)
    tl.store(held_ptr + HELD_NTH * P, nth, mask=shared)
    tl.debug_barrier()
    return tl.minimum(tl.max(label, 0) + 1, shape.num_experts)
