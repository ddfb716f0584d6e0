"""Refine: swap items between a heavy and a light pack.

State: `item_at` [NUM_PACKS * S], the item in each slot, changed in place; the packs' loads are float64, at first the
sum of their items' loads in slot order, then carried from swap to swap. Ties go by an item's index, not its slot.
"""
# ruff: noqa: N806, PLR0915
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import (
    EPSILON,
    float64,
    largest_double,
    smallest_double,
)
from eplb_triton.kernels.swaps import (
    LEVEL,
    best_corner,
    exceeds,
    loads_at,
    meets,
    nearest_pair,
    sum_packs,
    swap_items,
    two_heaviest,
    two_lightest,
)

UNBALANCED_AT_START = tl.constexpr(constants.UNBALANCED_AT_START)
UNBALANCED_AFTER_STEP = tl.constexpr(constants.UNBALANCED_AFTER_STEP)
GOOD_SWAP = tl.constexpr(constants.GOOD_SWAP)


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
        held = sum_packs(items, shape)
        step = 0
        going = True
        while (step < rule.steps) & going:
            heavy_load, heavy = largest_double(held, inside, pack)
            light_load, light = smallest_double(held, inside, pack)
            difference = heavy_load - light_load
            score, pair = nearest_pair(items, heavy, light, difference, S)
            usable = (light != heavy) & (difference > float64(LEVEL))
            if rule.lights == 2:
                next_load, next_light = smallest_double(held, inside & (pack != light), pack)
                next_difference = heavy_load - next_load
                next_score, next_pair = nearest_pair(items, heavy, next_light, next_difference, S)
                next_usable = (next_light != heavy) & (next_difference > float64(LEVEL))
                better = next_usable & ((usable == 0) | (next_score < score))
                light = tl.where(better, next_light, light)
                difference = tl.where(better, next_difference, difference)
                score = tl.where(better, next_score, score)
                pair = tl.where(better, next_pair, pair)
                usable = usable | next_usable
            going = usable & (score < difference - float64(LEVEL))
            if going:
                held = swap_items(items, held, pack, heavy, pair // S, light, pair % S, S)
            step += 1


@triton.jit
def corner_gpu_steps(items, rule: tl.constexpr, shape: tl.constexpr):
    """Steps that `refine_corner` takes on GPUs: one more where their starting loads are unequal."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    unequal = exceeds(sum_packs(items, shape), items.pack_loads, UNBALANCED_AT_START, NUM_PACKS)
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
        held = sum_packs(items, shape)
        step = 0
        allowed = steps
        going = True
        while (step < allowed) & going:
            heavy_load, heavy = largest_double(held, inside, pack)
            i_1, i_2 = two_heaviest(items, heavy, S, SLOTS)
            w_i1, w_i2 = loads_at(items, heavy, i_1, i_2, S)
            light_load, light = smallest_double(held, inside & (pack != heavy), pack)
            j_1, j_2 = two_lightest(items, light, S, SLOTS)
            w_j1, w_j2 = loads_at(items, light, j_1, j_2, S)
            difference = heavy_load - light_load
            score, i, j = best_corner(difference, i_1, i_2, w_i1, w_i2, j_1, j_2, w_j1, w_j2)
            target = light
            target_difference = difference
            if NUM_PACKS > 2:
                others = inside & (pack != heavy) & (pack != light)
                next_load, next_light = smallest_double(held, others, pack)
                k_1, k_2 = two_lightest(items, next_light, S, SLOTS)
                w_k1, w_k2 = loads_at(items, next_light, k_1, k_2, S)
                next_difference = heavy_load - next_load
                next_score, next_i, next_j = best_corner(next_difference, i_1, i_2, w_i1, w_i2, k_1, k_2, w_k1, w_k2)
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
                held = swap_items(items, held, pack, heavy, i, target, j, S)
                if step == 0:
                    if steps == 1:
                        unequal = exceeds(held, items.pack_loads, UNBALANCED_AFTER_STEP, NUM_PACKS)
                        allowed = tl.where(unequal, 2, 1)
                    else:
                        going = score > float64(GOOD_SWAP) * target_difference
            if both:
                held = swap_items(items, held, pack, heavy, i_1, light, j_1, S)
                held = swap_items(items, held, pack, heavy, i_2, light, j_2, S)
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
        held = sum_packs(items, shape)
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
                i_1, i_2 = two_heaviest(items, donor, S, SLOTS)
                w_i1, w_i2 = loads_at(items, donor, i_1, i_2, S)
                j_1, j_2 = two_lightest(items, receiver, S, SLOTS)
                w_j1, w_j2 = loads_at(items, receiver, j_1, j_2, S)
                meets_i1 = meets(items, donor, i_1, receiver, S, SLOTS)
                meets_i2 = meets(items, donor, i_2, receiver, S, SLOTS)
                meets_j1 = meets(items, receiver, j_1, donor, S, SLOTS)
                meets_j2 = meets(items, receiver, j_2, donor, S, SLOTS)
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
            swap_items(items, held, pack, best_donor, best_i, best_receiver, best_j, S)
