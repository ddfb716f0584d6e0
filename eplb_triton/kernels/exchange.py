"""Exchange: items between heavy and light packs, until the heaviest is at its target or no exchange lightens it.

State, by place, pack * S + slot: `item_at`, `load_at` (fixed point) and `label_at`, changed in place. Scratch, by
position in the order of (load descending, number): `order` and `height`. An exchange never brings a label to a pack
that holds it. Its value is the larger of the two pack loads after it, and has to be below the heavier of the two
before. A lane is a meeting of two packs, or of the heaviest with a pair of items of a light one.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, at, smallest
from eplb_triton.kernels.fixed import PENALTY

PACKS_PER_PROPOSER = tl.constexpr(8)
MASK_BITS = tl.constexpr(63)  # slots whose bans fit the bits of an int64


@triton.jit
def refine_pairs(
    item_at_ptr,  # int32 [NUM_ITEMS]
    load_at_ptr,
    label_at_ptr,
    order_ptr,  # int32 [NUM_PACKS], scratch
    height_ptr,  # int32 [NUM_PACKS], scratch
    NUM_PACKS: tl.constexpr,
    target,
    ROUNDS: tl.constexpr,
    NUM_ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Up to ROUNDS times, position q of the heavier half makes its best exchange with m - 1 - ((q + r) mod m // 2).
    Ties: the lowest slot of the heavier pack, then of the lighter one."""
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    HALF: tl.constexpr = NUM_PACKS // 2
    if HALF > 0 and S > 1:
        q = tl.arange(0, PACKS)
        meets = q < HALF
        r = 0
        going = True
        while (r < ROUNDS) & going:
            going = _stand(load_at_ptr, order_ptr, height_ptr, S, NUM_PACKS, PACKS) > target
            if going:
                light_at = NUM_PACKS - 1 - (q + r) % HALF
                heavy = tl.load(order_ptr + q, mask=meets, other=0)
                light = tl.load(order_ptr + light_at, mask=meets, other=0)
                heavy_load = tl.load(height_ptr + q, mask=meets, other=0)
                light_load = tl.load(height_ptr + light_at, mask=meets, other=0)
                value, pair = _best_pair(load_at_ptr, label_at_ptr, heavy, light, heavy_load, light_load, meets, S)
                gains = meets & (value < heavy_load)
                _swap(item_at_ptr, load_at_ptr, label_at_ptr, heavy * S + pair // S, light * S + pair % S, gains)
            r += 1


@triton.jit
def refine_match(
    item_at_ptr,
    load_at_ptr,
    label_at_ptr,
    order_ptr,
    height_ptr,
    proposal_ptr,  # int32 [PROPOSERS], scratch
    NUM_PACKS: tl.constexpr,
    target,
    ROUNDS: tl.constexpr,
    PROPOSERS: tl.constexpr,
    NUM_ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
    MEETINGS: tl.constexpr,  # a power of two, a multiple of PACKS: meetings valued at once
):
    """Up to ROUNDS times, each of the PROPOSERS heaviest packs above the target proposes its best exchange with any
    behind it; the heaviest go first, and no pack takes part in two; nothing is done if the heaviest has no proposal.
    Ties: the heavier partner, then the lowest slot of the proposer, then of the partner."""
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    if PROPOSERS > 0 and S > 1:
        position = tl.arange(0, PACKS)
        step = 0
        going = True
        while (step < ROUNDS) & going:
            going = _stand(load_at_ptr, order_ptr, height_ptr, S, NUM_PACKS, PACKS) > target
            if going:
                _propose(
                    load_at_ptr, label_at_ptr, order_ptr, height_ptr, proposal_ptr, NUM_PACKS, target, PROPOSERS, S,
                    PACKS, MEETINGS,
                )  # fmt: skip
                going = tl.load(proposal_ptr) >= 0
                taken = tl.zeros((PACKS,), tl.int32)
                for q in tl.range(0, PROPOSERS):
                    proposal = tl.load(proposal_ptr + q)
                    partner = proposal // (S * S)
                    involved = (position == q) | (position == partner)
                    grant = going & (proposal >= 0) & (tl.max(tl.where(involved, taken, 0), 0) == 0)
                    place_i = tl.load(order_ptr + q) * S + proposal % (S * S) // S
                    place_j = tl.load(order_ptr + tl.where(grant, partner, 0)) * S + proposal % S
                    _swap(item_at_ptr, load_at_ptr, label_at_ptr, place_i, place_j, grant)
                    taken = tl.where(grant & involved, 1, taken)
            step += 1


@triton.jit
def _propose(
    load_at_ptr,
    label_at_ptr,
    order_ptr,
    height_ptr,
    proposal_ptr,
    NUM_PACKS: tl.constexpr,
    target,
    PROPOSERS: tl.constexpr,
    S: tl.constexpr,
    PACKS: tl.constexpr,
    MEETINGS: tl.constexpr,
):
    """For each proposer (position of the partner * S + own slot) * S + the partner's slot, or -1."""
    meeting = tl.arange(0, MEETINGS)
    partner = meeting % PACKS
    for first in tl.range(0, PROPOSERS, MEETINGS // PACKS):
        proposer = first + meeting // PACKS
        meets = (proposer < PROPOSERS) & (partner < NUM_PACKS) & (partner > proposer)
        heavy = tl.load(order_ptr + proposer, mask=meets, other=0)
        light = tl.load(order_ptr + partner, mask=meets, other=0)
        heavy_load = tl.load(height_ptr + proposer, mask=meets, other=0)
        light_load = tl.load(height_ptr + partner, mask=meets, other=0)
        value, pair = _best_pair(load_at_ptr, label_at_ptr, heavy, light, heavy_load, light_load, meets, S)
        for q in tl.range(first, tl.minimum(first + MEETINGS // PACKS, PROPOSERS)):
            load = tl.load(height_ptr + q)
            best, index = smallest(tl.where(proposer == q, value, HIGHEST), meeting)
            proposal = (index % PACKS) * (S * S) + at(pair, meeting, index)
            tl.store(proposal_ptr + q, tl.where((best < load) & (load > target), proposal, -1))
    tl.debug_barrier()


@triton.jit
def refine_doubles(
    item_at_ptr,
    load_at_ptr,
    label_at_ptr,
    order_ptr,
    height_ptr,
    NUM_PACKS: tl.constexpr,
    target,
    STEPS: tl.constexpr,
    PARTNERS: tl.constexpr,  # the lightest packs that are met; 0: the stage is left out
    NUM_ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
    CANDIDATES: tl.constexpr,  # a power of two, at least PARTNERS * pairs of items
):
    """Up to STEPS times, the best exchange of two items of the heaviest pack for two of one of the PARTNERS lightest.
    Ties: the heavier partner, then the lowest slots of the heaviest pack, then of the partner (two: lexicographic)."""
    S: tl.constexpr = NUM_ITEMS // NUM_PACKS
    PAIRS: tl.constexpr = S * (S - 1) // 2
    if PARTNERS > 0:
        candidate = tl.arange(0, CANDIDATES)
        there = candidate < PARTNERS * PAIRS
        light_at = NUM_PACKS - PARTNERS + candidate // PAIRS
        first, second = _pair_slots(candidate % PAIRS, S)
        step = 0
        going = True
        while (step < STEPS) & going:
            load = _stand(load_at_ptr, order_ptr, height_ptr, S, NUM_PACKS, PACKS)
            going = load > target
            if going:
                heavy = tl.load(order_ptr)
                light = tl.load(order_ptr + light_at, mask=there, other=0)
                light_load = tl.load(height_ptr + light_at, mask=there, other=0)
                value, pair_i = _best_double(
                    load_at_ptr, label_at_ptr, heavy, light, load, light_load, first, second, there, S
                )
                best = tl.min(value, 0)
                going = best < load
                tied = value == best
                at_best = tl.min(tl.where(tied, light_at, HIGHEST), 0)
                tied = tied & (light_at == at_best)
                i = tl.min(tl.where(tied, pair_i, HIGHEST), 0)
                index = tl.min(tl.where(tied & (pair_i == i), candidate, HIGHEST), 0)
                if going:
                    its_light = tl.load(order_ptr + at_best) * S
                    j_1 = its_light + at(first, candidate, index)
                    j_2 = its_light + at(second, candidate, index)
                    _swap(item_at_ptr, load_at_ptr, label_at_ptr, heavy * S + i // S, j_1, going)
                    _swap(item_at_ptr, load_at_ptr, label_at_ptr, heavy * S + i % S, j_2, going)
            step += 1


@triton.jit
def _stand(load_at_ptr, order_ptr, height_ptr, S: tl.constexpr, NUM_PACKS: tl.constexpr, PACKS: tl.constexpr):
    """Fill order and height; the heaviest load."""
    pack = tl.arange(0, PACKS)
    inside = pack < NUM_PACKS
    total = tl.zeros((PACKS,), tl.int32)
    for k in tl.range(0, S):
        total += tl.load(load_at_ptr + pack * S + k, mask=inside, other=0)
    key = (total.to(tl.int64) << 32) | (PACKS - 1 - pack).to(tl.int64)
    key = tl.sort(tl.where(inside, key, -1), descending=True)
    tl.store(order_ptr + pack, PACKS - 1 - (key & 0x7FFFFFFF).to(tl.int32), mask=inside)
    tl.store(height_ptr + pack, (key >> 32).to(tl.int32), mask=inside)
    tl.debug_barrier()
    return tl.max(total, 0)


@triton.jit
def _swap(item_at_ptr, load_at_ptr, label_at_ptr, place_i, place_j, apply):
    """Exchange what is at the places, one pair of them a lane."""
    item_i = tl.load(item_at_ptr + place_i, mask=apply, other=0)
    item_j = tl.load(item_at_ptr + place_j, mask=apply, other=0)
    load_i = tl.load(load_at_ptr + place_i, mask=apply, other=0)
    load_j = tl.load(load_at_ptr + place_j, mask=apply, other=0)
    label_i = tl.load(label_at_ptr + place_i, mask=apply, other=0)
    label_j = tl.load(label_at_ptr + place_j, mask=apply, other=0)
    tl.debug_barrier()
    tl.store(item_at_ptr + place_i, item_j, mask=apply)
    tl.store(item_at_ptr + place_j, item_i, mask=apply)
    tl.store(load_at_ptr + place_i, load_j, mask=apply)
    tl.store(load_at_ptr + place_j, load_i, mask=apply)
    tl.store(label_at_ptr + place_i, label_j, mask=apply)
    tl.store(label_at_ptr + place_j, label_i, mask=apply)
    tl.debug_barrier()


@triton.jit
def _best_pair(load_at_ptr, label_at_ptr, heavy, light, heavy_load, light_load, meets, S: tl.constexpr):
    """Per lane, value (above every load where there is none) and i * S + j of the best exchange. Ties: lowest i, j."""
    ban_i = tl.zeros_like(heavy).to(tl.int64)  # bit i: the light pack holds the label of the heavy one's item i
    ban_j = ban_i
    if S <= MASK_BITS:
        for i in tl.range(0, S):
            label = tl.load(label_at_ptr + heavy * S + i, mask=meets, other=-1)
            for j in tl.range(0, S):
                same = (label == tl.load(label_at_ptr + light * S + j, mask=meets, other=-2)).to(tl.int64)
                ban_i = ban_i | (same << i)
                ban_j = ban_j | (same << j)
    value = tl.zeros_like(heavy) + 2 * PENALTY
    pair = tl.zeros_like(heavy)
    for i in tl.range(0, S):
        load_i = tl.load(load_at_ptr + heavy * S + i, mask=meets, other=0)
        if S <= MASK_BITS:
            free_i = meets & (((ban_i >> i) & 1) == 0)
        else:
            free_i = meets & (_holds(label_at_ptr, light, heavy * S + i, meets, S) == 0)
        left = heavy_load - load_i
        for j in tl.range(0, S):
            load_j = tl.load(load_at_ptr + light * S + j, mask=meets, other=0)
            if S <= MASK_BITS:
                free = free_i & (((ban_j >> j) & 1) == 0)
            else:
                free = free_i & (_holds(label_at_ptr, heavy, light * S + j, meets, S) == 0)
            worse = tl.maximum(left + load_j, (light_load - load_j) + load_i)
            better = free & (worse < value)
            value = tl.where(better, worse, value)
            pair = tl.where(better, i * S + j, pair)
    return value, pair


@triton.jit
def _holds(label_at_ptr, pack, place, meets, S: tl.constexpr):
    """1 where `pack` holds the label at `place`."""
    label = tl.load(label_at_ptr + place, mask=meets, other=-1)
    found = tl.zeros_like(label)
    for k in tl.range(0, S):
        found = found | (tl.load(label_at_ptr + pack * S + k, mask=meets, other=-2) == label).to(tl.int32)
    return found


@triton.jit
def _pair_slots(pair, S: tl.constexpr):
    """The two slots, first < second, of pairs in lexicographic order."""
    first = tl.zeros_like(pair)
    for slot in tl.range(1, S):
        first = tl.where(pair >= slot * (2 * S - slot - 1) // 2, slot, first)
    return first, pair - first * (2 * S - first - 1) // 2 + first + 1


@triton.jit
def _best_double(
    load_at_ptr, label_at_ptr, heavy, light, heavy_load, light_load, first, second, there, S: tl.constexpr
):
    """Per lane, value and slots i_1 * S + i_2 of the two items of `heavy` that are best exchanged for the lane's two of
    `light`. Ties: lowest i_1, then i_2."""
    load_j = tl.load(load_at_ptr + light * S + first, mask=there, other=0)
    load_j += tl.load(load_at_ptr + light * S + second, mask=there, other=0)
    label_1 = tl.load(label_at_ptr + light * S + first, mask=there, other=-1)
    label_2 = tl.load(label_at_ptr + light * S + second, mask=there, other=-1)
    ban_i = tl.zeros_like(light)
    free_j = there
    for i in tl.range(0, S):
        label = tl.load(label_at_ptr + heavy * S + i)
        free_j = free_j & (label_1 != label) & (label_2 != label)
        for k in tl.range(0, S):
            same = tl.load(label_at_ptr + light * S + k, mask=there, other=-1) == label
            ban_i = ban_i | (same.to(tl.int32) << i)
    value = tl.zeros_like(light) + 2 * PENALTY
    pair = tl.zeros_like(light)
    for i_1 in tl.range(0, S - 1):
        for i_2 in tl.range(i_1 + 1, S):
            load_i = tl.load(load_at_ptr + heavy * S + i_1) + tl.load(load_at_ptr + heavy * S + i_2)
            free = free_j & ((((ban_i >> i_1) | (ban_i >> i_2)) & 1) == 0)
            worse = tl.maximum((heavy_load - load_i) + load_j, (light_load - load_j) + load_i)
            better = free & (worse < value)
            value = tl.where(better, worse, value)
            pair = tl.where(better, i_1 * S + i_2, pair)
    return value, pair
