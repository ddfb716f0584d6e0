"""Exchange: items between heavy and light packs, until the heaviest is at its target or no exchange lightens it.

Its state is `Places`. An exchange never brings a label to a pack
that holds it. Its value is the larger of the two pack loads after it, and has to be below the heavier of the two
before. A lane is a meeting of two packs, or of the heaviest with a pair of items of a light one.

MARKED: a label is a bit of its own, or 0 if no other item has it; then one AND tells whether a pack holds it. Else
labels are numbers, and each item is compared with each of the other pack.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST
from eplb_triton.kernels.meetings import best_double, best_pair, pair_slots
from eplb_triton.kernels.positions import rank_packs


@triton.jit
def refine_pairs(
    places,
    target,
    rule: tl.constexpr,  # Exchanging
    MARKED: tl.constexpr,
    shape: tl.constexpr,  # Packing
):
    """Up to `rule.pair_rounds` times, position q of the heavier half makes its best exchange with position
    m - 1 - ((q + r) mod m // 2). Ties: the lowest slot of the heavier pack, then of the lighter one."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    S: tl.constexpr = shape.num_items // NUM_PACKS
    HALF: tl.constexpr = NUM_PACKS // 2
    if HALF > 0 and S > 1:
        q = tl.arange(0, shape.pack_lanes)
        meets = q < HALF
        r = 0
        going = True
        while (r < rule.pair_rounds) & going:
            going = _stand(places, shape) > target
            if going:
                light_at = NUM_PACKS - 1 - (q + r) % HALF
                heavy = tl.load(places.order + q, mask=meets, other=0)
                light = tl.load(places.order + light_at, mask=meets, other=0)
                heavy_load = tl.load(places.height + q, mask=meets, other=0)
                light_load = tl.load(places.height + light_at, mask=meets, other=0)
                value, pair = best_pair(places, heavy, light, heavy_load, light_load, meets, S, MARKED)
                gains = meets & (value < heavy_load)
                _swap(places, heavy * S + pair // S, light * S + pair % S, gains)
            r += 1


@triton.jit
def refine_match(
    places,
    target,
    rule: tl.constexpr,  # Exchanging
    MARKED: tl.constexpr,
    shape: tl.constexpr,  # Packing
):
    """Up to `rule.match_rounds` times, each of the proposers, the heaviest packs, that is above the target proposes its
    best exchange with any behind it; the heaviest go first, and no pack takes part in two; nothing is done if the
    heaviest has no proposal. Ties: the heavier partner, then the lowest slot of the proposer, then of the partner."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    PROPOSERS: tl.constexpr = rule.proposers
    S: tl.constexpr = shape.num_items // NUM_PACKS
    if PROPOSERS > 0 and S > 1:
        position = tl.arange(0, shape.pack_lanes)
        step = 0
        going = True
        while (step < rule.match_rounds) & going:
            going = _stand(places, shape) > target
            if going:
                _propose(places, target, rule, MARKED, shape)
                going = tl.load(places.spare) >= 0
                proposal = tl.load(places.spare + position, mask=position < PROPOSERS, other=-1)
                partner = proposal // (S * S)
                granted = (position == 0) & (proposal >= 0)
                for q in tl.range(1, PROPOSERS):
                    its = tl.load(places.spare + q)
                    taken = granted & ((partner == its // (S * S)) | (partner == q))
                    grant = going & (its >= 0) & (tl.max(taken.to(tl.int32), 0) == 0)
                    granted = granted | (position == tl.where(grant, q, -1))
                heavy = tl.load(places.order + position, mask=granted, other=0)
                light = tl.load(places.order + partner, mask=granted, other=0)
                place_i, place_j = heavy * S + proposal % (S * S) // S, light * S + proposal % S
                _swap(places, place_i, place_j, granted)
            step += 1


@triton.jit
def _propose(places, target, rule: tl.constexpr, MARKED: tl.constexpr, shape: tl.constexpr):
    """For each proposer (position of the partner * S + own slot) * S + the partner's slot, or -1. A proposer is a row
    of lanes, so that a reduction over its partners stays in a warp where they are no more than its lanes."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    S: tl.constexpr = shape.num_items // NUM_PACKS
    PROPOSERS: tl.constexpr = rule.proposers
    MEETINGS: tl.constexpr = rule.meetings
    PARTNERS: tl.constexpr = triton.next_power_of_2(NUM_PACKS)
    ROWS: tl.constexpr = MEETINGS // PARTNERS
    meeting = tl.arange(0, MEETINGS)
    partner = meeting % PARTNERS
    for first in tl.range(0, PROPOSERS, ROWS):
        proposer = first + meeting // PARTNERS
        meets = (proposer < PROPOSERS) & (partner < NUM_PACKS) & (partner > proposer)
        heavy = tl.load(places.order + proposer, mask=meets, other=0)
        light = tl.load(places.order + partner, mask=meets, other=0)
        heavy_load = tl.load(places.height + proposer, mask=meets, other=0)
        light_load = tl.load(places.height + partner, mask=meets, other=0)
        value, pair = best_pair(places, heavy, light, heavy_load, light_load, meets, S, MARKED)
        number = tl.reshape(partner * (S * S) + pair, (ROWS, PARTNERS))
        value = tl.reshape(value, (ROWS, PARTNERS))
        best = tl.min(value, 1)
        proposal = tl.min(tl.where(value == best[:, None], number, HIGHEST), 1)
        q = first + tl.arange(0, ROWS)
        load = tl.load(places.height + q, mask=q < PROPOSERS, other=0)
        proposes = (best < load) & (load > target)
        tl.store(places.spare + q, tl.where(proposes, proposal, -1), mask=q < PROPOSERS)
    tl.debug_barrier()


@triton.jit
def refine_doubles(
    places,
    target,
    rule: tl.constexpr,  # Exchanging
    MARKED: tl.constexpr,
    shape: tl.constexpr,  # Packing
):
    """Up to `rule.double_steps` times, the best exchange of two items of the heaviest pack for two of a partner, one of
    the lightest packs.
    Ties: the heavier partner, then the lowest slots of the heaviest pack, then of the partner (two: lexicographic)."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    PARTNERS: tl.constexpr = rule.partners
    S: tl.constexpr = shape.num_items // NUM_PACKS
    PAIRS: tl.constexpr = S * (S - 1) // 2
    if PARTNERS > 0:
        tl.static_assert(NUM_PACKS * S * S * PAIRS < 2**31, "a candidate's number has 31 bits")
        candidate = tl.arange(0, rule.candidate_lanes)
        there = candidate < PARTNERS * PAIRS
        light_at = NUM_PACKS - PARTNERS + candidate // PAIRS
        first, second = pair_slots(candidate % PAIRS, S)
        slot = tl.arange(0, 2)
        step = 0
        going = True
        while (step < rule.double_steps) & going:
            load = _stand(places, shape)
            going = load > target
            if going:
                heavy = tl.load(places.order)
                light = tl.load(places.order + light_at, mask=there, other=0)
                light_load = tl.load(places.height + light_at, mask=there, other=0)
                value, pair_i = best_double(
                    places, heavy, light, load, light_load, first, second, there, S, MARKED
                )  # fmt: skip
                best = tl.min(value, 0)
                number = (light_at * (S * S) + pair_i) * PAIRS + candidate % PAIRS
                chosen = tl.min(tl.where(value == best, number, HIGHEST), 0)
                going = best < load
                its_light = tl.load(places.order + tl.where(going, chosen // (S * S * PAIRS), 0))
                i = chosen // PAIRS % (S * S)
                j_1, j_2 = pair_slots(chosen % PAIRS, S)
                place_i = heavy * S + tl.where(slot == 0, i // S, i % S)
                place_j = its_light * S + tl.where(slot == 0, j_1, j_2)
                _swap(places, place_i, place_j, slot < tl.where(going, 2, 0))
            step += 1


@triton.jit
def _stand(places, shape: tl.constexpr):
    """Fill order and height; the heaviest load."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    S: tl.constexpr = shape.num_items // NUM_PACKS
    pack = tl.arange(0, shape.pack_lanes)
    inside = pack < NUM_PACKS
    total = tl.zeros_like(pack)
    for k in tl.range(0, S):
        total += tl.load(places.load_at + pack * S + k, mask=inside, other=0)
    position = rank_packs(-total, pack, places.spare, places.keys, NUM_PACKS)
    tl.store(places.order + position, pack, mask=inside)
    tl.store(places.height + position, total, mask=inside)
    tl.debug_barrier()
    return tl.load(places.height)


@triton.jit
def _swap(places, place_i, place_j, apply):
    """Exchange what is at the places, one pair of them a lane."""
    item_i = tl.load(places.item_at + place_i, mask=apply, other=0)
    item_j = tl.load(places.item_at + place_j, mask=apply, other=0)
    load_i = tl.load(places.load_at + place_i, mask=apply, other=0)
    load_j = tl.load(places.load_at + place_j, mask=apply, other=0)
    label_i = tl.load(places.label_at + place_i, mask=apply, other=0)
    label_j = tl.load(places.label_at + place_j, mask=apply, other=0)
    tl.debug_barrier()
    tl.store(places.item_at + place_i, item_j, mask=apply)
    tl.store(places.item_at + place_j, item_i, mask=apply)
    tl.store(places.load_at + place_i, load_j, mask=apply)
    tl.store(places.load_at + place_j, load_i, mask=apply)
    tl.store(places.label_at + place_i, label_j, mask=apply)
    tl.store(places.label_at + place_j, label_i, mask=apply)
    tl.debug_barrier()
