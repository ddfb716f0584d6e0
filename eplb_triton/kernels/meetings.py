"""What an exchange between two packs is worth: a lane is a meeting of two, or of one and a pair of items of another."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.fixed import PENALTY

MASK_BITS = tl.constexpr(63)  # slots whose bans fit the bits of an int64


@triton.jit
def best_pair(places, heavy, light, heavy_load, light_load, meets, S: tl.constexpr, MARKED: tl.constexpr):
    """Per lane, value (above every load where there is none) and i * S + j of the best exchange. Ties: lowest i, j.

    Lanes without a meeting read some pack's items: loads without a mask stay in registers from one i to the next."""
    marks_i = tl.zeros_like(heavy)
    marks_j = marks_i
    ban_i = marks_i.to(tl.int64)  # bit i: the light pack holds the label of the heavy one's item i
    ban_j = ban_i
    if MARKED:
        for k in tl.range(0, S):
            marks_i = marks_i | tl.load(places.label_at + heavy * S + k)
            marks_j = marks_j | tl.load(places.label_at + light * S + k)
    elif S <= MASK_BITS:
        for i in tl.range(0, S):
            label = tl.load(places.label_at + heavy * S + i)
            for j in tl.range(0, S):
                same = (label == tl.load(places.label_at + light * S + j)).to(tl.int64)
                ban_i = ban_i | (same << i)
                ban_j = ban_j | (same << j)
    value = tl.zeros_like(heavy) + 2 * PENALTY
    best_i = tl.zeros_like(heavy)
    for i in tl.range(0, S, loop_unroll_factor=3):
        stays, comes = _side(places, heavy, light, heavy_load, i, ban_i, marks_j, S, MARKED)
        least = tl.zeros_like(heavy) + 2 * PENALTY
        for j in tl.range(0, S):
            left, load_j = _side(places, light, heavy, light_load, j, ban_j, marks_i, S, MARKED)
            least = tl.minimum(least, tl.maximum(stays + load_j, comes + left))
        best_i = tl.where(least < value, i, best_i)
        value = tl.minimum(least, value)
    stays, comes = _side(places, heavy, light, heavy_load, best_i, ban_i, marks_j, S, MARKED)
    best_j = tl.zeros_like(heavy)
    for k in tl.range(0, S):
        j = S - 1 - k
        left, load_j = _side(places, light, heavy, light_load, j, ban_j, marks_i, S, MARKED)
        best_j = tl.where(tl.maximum(stays + load_j, comes + left) == value, j, best_j)
    return tl.where(meets, value, 2 * PENALTY), best_i * S + best_j


@triton.jit
def _side(places, pack, other, pack_load, slot, bans, marks_of_other, S: tl.constexpr, MARKED: tl.constexpr):
    """What an item of `pack` leaves there, and what it brings to `other`: more than any load if that is not allowed."""
    load = tl.load(places.load_at + pack * S + slot)
    held = _held(places, pack, other, slot, bans, marks_of_other, S, MARKED, not MARKED)
    return pack_load - load, load + tl.where(held == 0, 0, PENALTY)


@triton.jit
def _held(places, pack, other, slot, bans, marks_of_other, S: tl.constexpr, MARKED: tl.constexpr, BANNED: tl.constexpr):
    """Not 0 where `other` holds the label of the item in a slot of `pack`: from BANNED slots while they fit a word."""
    if BANNED and S <= MASK_BITS:
        held = ((bans >> slot) & 1).to(tl.int32)
    elif MARKED:
        held = tl.load(places.label_at + pack * S + slot) & marks_of_other
    else:
        label = tl.load(places.label_at + pack * S + slot)
        held = tl.zeros_like(other)
        for k in tl.range(0, S):
            held = held | (tl.load(places.label_at + other * S + k) == label).to(tl.int32)
    return held


@triton.jit
def pair_slots(pair, S: tl.constexpr):
    """The two slots, first < second, of pairs in lexicographic order."""
    first = tl.zeros_like(pair)
    for slot in tl.range(1, S):
        first = tl.where(pair >= slot * (2 * S - slot - 1) // 2, slot, first)
    return first, pair - first * (2 * S - first - 1) // 2 + first + 1


@triton.jit
def best_double(
    places, heavy, light, heavy_load, light_load, first, second, there, S: tl.constexpr, MARKED: tl.constexpr
):
    """Per lane, value and slots i_1 * S + i_2 of the two items of `heavy` that are best exchanged for the lane's two of
    `light`. Ties: lowest i_1, then i_2."""
    WORD: tl.constexpr = tl.int32 if S <= 32 else tl.int64  # a bit of it bans a slot of `heavy`
    load_j = tl.load(places.load_at + light * S + first) + tl.load(places.load_at + light * S + second)
    label_1 = tl.load(places.label_at + light * S + first)
    label_2 = tl.load(places.label_at + light * S + second)
    ban_i = tl.zeros_like(light).to(WORD)
    marks_j = tl.zeros_like(light)
    free_j = there
    if MARKED:
        for k in tl.range(0, S):
            marks_j = marks_j | tl.load(places.label_at + light * S + k)
        for i in tl.range(0, S):
            mark = tl.load(places.label_at + heavy * S + i)
            free_j = free_j & (((label_1 | label_2) & mark) == 0)
            if S <= MASK_BITS:
                ban_i = ban_i | (((marks_j & mark) != 0).to(WORD) << i)
    else:
        for i in tl.range(0, S):
            label = tl.load(places.label_at + heavy * S + i)
            free_j = free_j & (label_1 != label) & (label_2 != label)
            if S <= MASK_BITS:
                for k in tl.range(0, S):
                    same = tl.load(places.label_at + light * S + k) == label
                    ban_i = ban_i | (same.to(WORD) << i)
    stays = light_load - load_j
    comes = load_j + tl.where(free_j, 0, PENALTY)
    value = tl.zeros_like(light) + 2 * PENALTY
    pair = tl.zeros_like(light)
    for i_1 in tl.range(0, S - 1):
        load_1 = tl.load(places.load_at + heavy * S + i_1)
        held_1 = _held(places, heavy, light, i_1, ban_i, marks_j, S, MARKED, True)
        for i_2 in tl.range(i_1 + 1, S):
            load_i = load_1 + tl.load(places.load_at + heavy * S + i_2)
            held_2 = _held(places, heavy, light, i_2, ban_i, marks_j, S, MARKED, True)
            banned = tl.where((held_1 | held_2) == 0, 0, PENALTY)
            worse = tl.maximum((heavy_load - load_i) + comes, stays + load_i) + banned
            pair = tl.where(worse < value, i_1 * S + i_2, pair)
            value = tl.minimum(worse, value)
    return value, pair
