"""What a swap between two packs needs to know: loads of packs, the best pairs of items, and the swap itself."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import (
    EPSILON,
    HIGHEST,
    LOWEST,
    bits,
    float64,
    largest,
    largest_double,
    ordered_sum,
    smallest,
    smallest_double,
)

LEVEL = tl.constexpr(constants.LEVEL)


@triton.jit
def sum_packs(items, shape: tl.constexpr):
    """float64 [pack_lanes]: loads of the items of each pack, summed in slot order; 0 beyond the last pack."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    S: tl.constexpr = shape.num_items // NUM_PACKS
    pack = tl.arange(0, shape.pack_lanes)
    inside = pack < NUM_PACKS
    total = tl.zeros_like(pack).to(tl.float64)
    for slot in tl.range(0, S, loop_unroll_factor=4):
        item = tl.load(items.item_at + pack * S + slot, mask=inside, other=0)
        total += tl.load(items.loads + item, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def exceeds(held, held_ptr, LIMIT: tl.constexpr, NUM_PACKS: tl.constexpr):
    """Whether (max - min) / max(mean, 1e-12) of the packs' loads is above LIMIT."""
    pack = tl.arange(0, held.shape[0])
    inside = pack < NUM_PACKS
    tl.store(held_ptr + pack, held, mask=inside)
    tl.debug_barrier()
    mean = ordered_sum(held_ptr, NUM_PACKS) / float64(1.0 * NUM_PACKS)
    tl.debug_barrier()
    most, _ = largest_double(held, inside, pack)
    least, _ = smallest_double(held, inside, pack)
    return (most - least) / tl.maximum(mean, float64(EPSILON)) > float64(LIMIT)


@triton.jit
def swap_items(items, held, pack, heavy, i, light, j, S: tl.constexpr):
    """Exchange slot i of pack heavy and slot j of pack light; returns the packs' loads, carried."""
    tl.debug_barrier()
    item_i = tl.load(items.item_at + heavy * S + i)
    item_j = tl.load(items.item_at + light * S + j)
    w_i = tl.load(items.loads + item_i).to(tl.float64)
    w_j = tl.load(items.loads + item_j).to(tl.float64)
    tl.debug_barrier()
    tl.store(items.item_at + heavy * S + i, item_j)
    tl.store(items.item_at + light * S + j, item_i)
    tl.debug_barrier()
    held = tl.where(pack == heavy, (held - w_i) + w_j, held)
    return tl.where(pack == light, (held - w_j) + w_i, held)


@triton.jit
def nearest_pair(items, heavy, light, difference, S: tl.constexpr):
    """The smallest score of all pairs of slots, and the pair as i * S + j."""
    PAIRS: tl.constexpr = S * S
    LANES: tl.constexpr = 64 if PAIRS <= 64 else (256 if PAIRS <= 256 else 1024)
    lane = tl.arange(0, LANES)
    best = tl.zeros((LANES,), tl.float64) + float64(float("inf"))
    best_both = tl.zeros((LANES,), tl.int32) + HIGHEST
    best_pair = lane
    for start in tl.range(0, PAIRS, LANES):
        pair = start + lane
        there = pair < PAIRS
        item_i = tl.load(items.item_at + heavy * S + pair // S, mask=there, other=0)
        item_j = tl.load(items.item_at + light * S + pair % S, mask=there, other=0)
        w_i = tl.load(items.loads + item_i, mask=there, other=0.0).to(tl.float64)
        w_j = tl.load(items.loads + item_j, mask=there, other=0.0).to(tl.float64)
        moved_load = w_i - w_j
        score = tl.abs(difference - (moved_load + moved_load))
        both = item_i * 4096 + item_j  # there are at most 4096 items
        better = there & ((score < best) | ((score == best) & (both < best_both)))
        best = tl.where(better, score, best)
        best_both = tl.where(better, both, best_both)
        best_pair = tl.where(better, pair, best_pair)
    score, both = smallest_double(best, best_both < HIGHEST, best_both)
    return score, tl.min(tl.where(best_both == both, best_pair, HIGHEST), 0)


@triton.jit
def best_corner(difference, i_1, i_2, w_i1, w_i2, j_1, j_2, w_j1, w_j2):
    """The first smallest score of the four single swaps, and its slots; infinite if the packs are level."""
    best = float64(float("inf"))
    i = i_1
    j = j_1
    for k in tl.static_range(4):
        moved_load = (w_i1 if k < 2 else w_i2) - (w_j1 if k % 2 == 0 else w_j2)
        score = tl.abs(difference - (moved_load + moved_load))
        better = (difference > float64(LEVEL)) & (score < best)
        best = tl.where(better, score, best)
        i = tl.where(better, i_1 if k < 2 else i_2, i)
        j = tl.where(better, j_1 if k % 2 == 0 else j_2, j)
    return best, i, j


@triton.jit
def two_heaviest(items, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of the heaviest and the second heaviest item of a pack. Ties: lowest item."""
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=HIGHEST)
    key = bits(tl.load(items.loads + item, mask=slot < S, other=-1.0))
    _, first = largest(key, item)
    _, second = largest(tl.where(item == first, LOWEST, key), item)
    return tl.min(tl.where(item == first, slot, HIGHEST), 0), tl.min(tl.where(item == second, slot, HIGHEST), 0)


@triton.jit
def two_lightest(items, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of the lightest and the second lightest item of a pack. Ties: lowest item."""
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=HIGHEST)
    key = tl.where(slot < S, bits(tl.load(items.loads + item, mask=slot < S, other=0.0)), HIGHEST)
    _, first = smallest(key, item)
    _, second = smallest(tl.where(item == first, HIGHEST, key), item)
    return tl.min(tl.where(item == first, slot, HIGHEST), 0), tl.min(tl.where(item == second, slot, HIGHEST), 0)


@triton.jit
def loads_at(items, pack, slot_1, slot_2, S: tl.constexpr):
    """Loads, float64, of the items in two slots of a pack."""
    item_1 = tl.load(items.item_at + pack * S + slot_1)
    item_2 = tl.load(items.item_at + pack * S + slot_2)
    return tl.load(items.loads + item_1).to(tl.float64), tl.load(items.loads + item_2).to(tl.float64)


@triton.jit
def meets(items, own_pack, own_slot, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """1 if `pack`, as it stands, holds a replica of the expert of the item in own_slot of own_pack."""
    label = tl.load(items.labels + tl.load(items.item_at + own_pack * S + own_slot))
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=0)
    other_label = tl.load(items.labels + item, mask=slot < S, other=-1)
    return tl.max((other_label == label).to(tl.int32), 0)
