"""Refine: swap items between a heavy and a light pack.

State: `item_at` [NUM_PACKS * S], the item in each slot, changed in place; the packs' loads are float64, at first the
sum of their items' loads in slot order, then carried from swap to swap. Ties go by an item's index, not its slot.
"""
# ruff: noqa: N803, N806, PLR0915
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

LEVEL = tl.constexpr(
    constants.LEVEL
)  # load difference (tokens) below which two packs count as level, and a swap as no gain
UNBALANCED_AT_START = tl.constexpr(
    constants.UNBALANCED_AT_START
)  # spread over mean from which corner takes one step more on GPUs
UNBALANCED_AFTER_STEP = tl.constexpr(
    constants.UNBALANCED_AFTER_STEP
)  # and from which a single step may be followed by a second
GOOD_SWAP = tl.constexpr(
    constants.GOOD_SWAP
)  # share of the difference that may stay after a swap for corner to be content


@triton.jit
def refine_nearest(
    items,
    rule: tl.constexpr,  # Refining
    shape: tl.constexpr,  # Packing
):
    """Up to `rule.steps` times, the swap between the heaviest pack and one of the `rule.lights` lightest that comes
    nearest to levelling the two. Ties: the lighter pack, then the lowest item of the heavy pack, then of the light
    one."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    S: tl.constexpr = shape.num_items // NUM_PACKS
    if S > 1 and NUM_PACKS > 1:
        pack = tl.arange(0, shape.pack_lanes)
        inside = pack < NUM_PACKS
        held = _pack_loads(items, shape)
        step = 0
        going = True
        while (step < rule.steps) & going:
            heavy_load, heavy = largest_double(held, inside, pack)
            light_load, light = smallest_double(held, inside, pack)
            difference = heavy_load - light_load
            score, pair = _nearest_pair(items, heavy, light, difference, S)
            usable = (light != heavy) & (difference > float64(LEVEL))
            if rule.lights == 2:
                next_load, next_light = smallest_double(held, inside & (pack != light), pack)
                next_difference = heavy_load - next_load
                next_score, next_pair = _nearest_pair(items, heavy, next_light, next_difference, S)
                next_usable = (next_light != heavy) & (next_difference > float64(LEVEL))
                better = next_usable & ((usable == 0) | (next_score < score))
                light = tl.where(better, next_light, light)
                difference = tl.where(better, next_difference, difference)
                score = tl.where(better, next_score, score)
                pair = tl.where(better, next_pair, pair)
                usable = usable | next_usable
            going = usable & (score < difference - float64(LEVEL))
            if going:
                held = _swap(items, held, pack, heavy, pair // S, light, pair % S, S)
            step += 1


@triton.jit
def corner_gpu_steps(items, rule: tl.constexpr, shape: tl.constexpr):
    """Steps that `refine_corner` takes on GPUs: one more where their starting loads are unequal."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    unequal = _exceeds(_pack_loads(items, shape), items.pack_loads, UNBALANCED_AT_START, NUM_PACKS)
    return rule.steps + unequal.to(tl.int32)


@triton.jit
def refine_corner(
    items,
    steps,
    shape: tl.constexpr,
):
    """Up to `steps` times: swap one of the two heaviest items of the heaviest pack with one of the two lightest of the
    two lightest other packs; where no such swap gains, both with both of the lightest. Ties: the lighter pack, the
    heavier item of the heavy pack, the lighter one of the light pack; among equal items the lowest."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    SLOTS: tl.constexpr = shape.slot_lanes
    S: tl.constexpr = shape.num_items // NUM_PACKS
    if S > 1 and NUM_PACKS > 1:
        pack = tl.arange(0, shape.pack_lanes)
        inside = pack < NUM_PACKS
        held = _pack_loads(items, shape)
        step = 0
        allowed = steps
        going = True
        while (step < allowed) & going:
            heavy_load, heavy = largest_double(held, inside, pack)
            i_1, i_2 = _two_heaviest(items, heavy, S, SLOTS)
            w_i1, w_i2 = _load_at(items, heavy, i_1, i_2, S)
            light_load, light = smallest_double(held, inside & (pack != heavy), pack)
            j_1, j_2 = _two_lightest(items, light, S, SLOTS)
            w_j1, w_j2 = _load_at(items, light, j_1, j_2, S)
            difference = heavy_load - light_load
            score, i, j = _best_corner(difference, i_1, i_2, w_i1, w_i2, j_1, j_2, w_j1, w_j2)
            target = light
            target_difference = difference
            if NUM_PACKS > 2:
                others = inside & (pack != heavy) & (pack != light)
                next_load, next_light = smallest_double(held, others, pack)
                k_1, k_2 = _two_lightest(items, next_light, S, SLOTS)
                w_k1, w_k2 = _load_at(items, next_light, k_1, k_2, S)
                next_difference = heavy_load - next_load
                next_score, next_i, next_j = _best_corner(next_difference, i_1, i_2, w_i1, w_i2, k_1, k_2, w_k1, w_k2)
                better = next_score < score
                score = tl.where(better, next_score, score)
                i = tl.where(better, next_i, i)
                j = tl.where(better, next_j, j)
                target = tl.where(better, next_light, light)
                target_difference = tl.where(better, next_difference, difference)
            single = score < target_difference - float64(LEVEL)
            moved = ((w_i1 + w_i2) - w_j1) - w_j2
            both = (single == 0) & (tl.abs(difference - (moved + moved)) < difference - float64(LEVEL))
            going = single | both
            if single:
                held = _swap(items, held, pack, heavy, i, target, j, S)
                if step == 0:
                    if steps == 1:
                        unequal = _exceeds(held, items.pack_loads, UNBALANCED_AFTER_STEP, NUM_PACKS)
                        allowed = tl.where(unequal, 2, 1)
                    else:
                        going = score > float64(GOOD_SWAP) * target_difference
            if both:
                held = _swap(items, held, pack, heavy, i_1, light, j_1, S)
                held = _swap(items, held, pack, heavy, i_2, light, j_2, S)
            step += 1


@triton.jit
def refine_peak(
    items,
    shape: tl.constexpr,
):
    """One swap between the two heaviest and the three lightest packs, judged by the key (largest pack load after,
    largest - smallest after, replicas that would meet another of their expert). Ties: the heavier donor (on equal loads
    the higher pack), the lighter receiver (the lower pack), the heavier item of the donor, the lighter one of the
    receiver; among equal items the lowest."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    SLOTS: tl.constexpr = shape.slot_lanes
    S: tl.constexpr = shape.num_items // NUM_PACKS
    if S > 1 and NUM_PACKS > 2:  # of two packs both are donors, and none receives
        NUM_RECEIVERS: tl.constexpr = 3 if NUM_PACKS > 4 else NUM_PACKS - 2
        pack = tl.arange(0, shape.pack_lanes)
        inside = pack < NUM_PACKS
        held = _pack_loads(items, shape)
        highest, donor_1 = largest_double(held, inside, -pack)
        donor_1 = -donor_1
        load_d2, donor_2 = largest_double(held, inside & (pack != donor_1), -pack)
        donor_2 = -donor_2
        lowest, receiver = smallest_double(held, inside, pack)
        waiting = inside
        peak = float64(float("inf"))
        spread = float64(float("inf"))
        penalty = 3
        best_donor = -1
        best_i = 0
        best_receiver = 0
        best_j = 0
        for candidate in tl.range(0, 2 * NUM_RECEIVERS):
            if candidate % NUM_RECEIVERS == 0:
                waiting = inside
            donor = tl.where(candidate < NUM_RECEIVERS, donor_1, donor_2)
            load_d = tl.where(candidate < NUM_RECEIVERS, highest, load_d2)
            load_r, receiver = smallest_double(held, waiting, pack)
            waiting = waiting & (pack != receiver)
            if load_d > load_r:
                others = inside & (pack != donor) & (pack != receiver)
                top, _ = largest_double(held, others, pack)
                bottom, _ = smallest_double(held, others, pack)
                i_1, i_2 = _two_heaviest(items, donor, S, SLOTS)
                w_i1, w_i2 = _load_at(items, donor, i_1, i_2, S)
                j_1, j_2 = _two_lightest(items, receiver, S, SLOTS)
                w_j1, w_j2 = _load_at(items, receiver, j_1, j_2, S)
                meets_i1 = _meets(items, donor, i_1, receiver, S, SLOTS)
                meets_i2 = _meets(items, donor, i_2, receiver, S, SLOTS)
                meets_j1 = _meets(items, receiver, j_1, donor, S, SLOTS)
                meets_j2 = _meets(items, receiver, j_2, donor, S, SLOTS)
                for k in tl.static_range(4):
                    w_i = w_i1 if k < 2 else w_i2
                    w_j = w_j1 if k % 2 == 0 else w_j2
                    new_d = (load_d - w_i) + w_j
                    new_r = (load_r - w_j) + w_i
                    new_peak = tl.maximum(top, tl.maximum(new_d, new_r))
                    new_spread = new_peak - tl.minimum(bottom, tl.minimum(new_d, new_r))
                    new_penalty = (meets_i1 if k < 2 else meets_i2) + (meets_j1 if k % 2 == 0 else meets_j2)
                    lower = (new_spread < spread) | ((new_spread == spread) & (new_penalty < penalty))
                    better = (new_peak < peak) | ((new_peak == peak) & lower)
                    peak = tl.where(better, new_peak, peak)
                    spread = tl.where(better, new_spread, spread)
                    penalty = tl.where(better, new_penalty, penalty)
                    best_donor = tl.where(better, donor, best_donor)
                    best_receiver = tl.where(better, receiver, best_receiver)
                    best_i = tl.where(better, i_1 if k < 2 else i_2, best_i)
                    best_j = tl.where(better, j_1 if k % 2 == 0 else j_2, best_j)
        level = tl.abs(peak - highest) <= float64(EPSILON)
        flatter = level & (spread + float64(EPSILON) < highest - lowest)
        if (best_donor >= 0) & ((peak + float64(EPSILON) < highest) | flatter):
            _swap(items, held, pack, best_donor, best_i, best_receiver, best_j, S)


@triton.jit
def _pack_loads(items, shape: tl.constexpr):
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
def _exceeds(held, held_ptr, LIMIT: tl.constexpr, NUM_PACKS: tl.constexpr):
    """Whether (max - min) / max(mean, 1e-12) of the packs' loads is above LIMIT."""
    pack = tl.arange(0, held.shape[0])
    inside = pack < NUM_PACKS
    tl.store(held_ptr + pack, held, mask=inside)
    tl.debug_barrier()
    mean = ordered_sum(held_ptr, NUM_PACKS) / float64(1.0 * NUM_PACKS)
    tl.debug_barrier()
    most, _ = largest_double(held, inside, pack)
    least, _ = smallest_double(held, inside, pack)
    return (most - least) / tl.maximum(mean, float64(1e-12)) > float64(LIMIT)


@triton.jit
def _swap(items, held, pack, heavy, i, light, j, S: tl.constexpr):
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
def _nearest_pair(items, heavy, light, difference, S: tl.constexpr):
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
def _best_corner(difference, i_1, i_2, w_i1, w_i2, j_1, j_2, w_j1, w_j2):
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
def _two_heaviest(items, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of the heaviest and the second heaviest item of a pack. Ties: lowest item."""
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=HIGHEST)
    key = bits(tl.load(items.loads + item, mask=slot < S, other=-1.0))
    _, first = largest(key, item)
    _, second = largest(tl.where(item == first, LOWEST, key), item)
    return tl.min(tl.where(item == first, slot, HIGHEST), 0), tl.min(tl.where(item == second, slot, HIGHEST), 0)


@triton.jit
def _two_lightest(items, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of the lightest and the second lightest item of a pack. Ties: lowest item."""
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=HIGHEST)
    key = tl.where(slot < S, bits(tl.load(items.loads + item, mask=slot < S, other=0.0)), HIGHEST)
    _, first = smallest(key, item)
    _, second = smallest(tl.where(item == first, HIGHEST, key), item)
    return tl.min(tl.where(item == first, slot, HIGHEST), 0), tl.min(tl.where(item == second, slot, HIGHEST), 0)


@triton.jit
def _load_at(items, pack, slot_1, slot_2, S: tl.constexpr):
    """Loads, float64, of the items in two slots of a pack."""
    item_1 = tl.load(items.item_at + pack * S + slot_1)
    item_2 = tl.load(items.item_at + pack * S + slot_2)
    return tl.load(items.loads + item_1).to(tl.float64), tl.load(items.loads + item_2).to(tl.float64)


@triton.jit
def _meets(items, own_pack, own_slot, pack, S: tl.constexpr, SLOTS: tl.constexpr):
    """1 if `pack`, as it stands, holds a replica of the expert of the item in own_slot of own_pack."""
    label = tl.load(items.labels + tl.load(items.item_at + own_pack * S + own_slot))
    slot = tl.arange(0, SLOTS)
    item = tl.load(items.item_at + pack * S + slot, mask=slot < S, other=0)
    other_label = tl.load(items.labels + item, mask=slot < S, other=-1)
    return tl.max((other_label == label).to(tl.int32), 0)
