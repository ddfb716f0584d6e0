"""Pack items into packs of equal size: heaviest first, each into the lightest that has room."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import (
    HIGHEST,
    at,
    bits,
    float64,
    from_bits,
    ordered_sum,
    smallest,
)
from eplb_triton.kernels.sorting import sort_descending

NEAR = tl.constexpr(constants.NEAR)


@triton.jit
def pack_plain(items, shape: tl.constexpr):
    """Each item, heaviest first, goes to the open pack of smallest load. Ties: lowest item, lowest pack."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    NUM_PACKS: tl.constexpr = shape.num_packs
    CAPACITY: tl.constexpr = NUM_ITEMS // NUM_PACKS
    item = tl.arange(0, shape.item_lanes)
    if CAPACITY == 1:
        tl.store(items.item_at + item, item, mask=item < NUM_ITEMS)
    elif NUM_PACKS == 1:
        _, sorted_item = _unpack(_sorted_items(items, shape))
        tl.store(items.item_at + item, sorted_item, mask=item < NUM_ITEMS)
    else:
        tl.store(items.sorted + item, _sorted_items(items, shape), mask=item < NUM_ITEMS)
        tl.debug_barrier()
        pack = tl.arange(0, shape.pack_lanes)
        key = tl.where(pack < NUM_PACKS, tl.zeros_like(pack), HIGHEST)
        place = pack * CAPACITY
        if shape.in_rounds:
            placed = 0
            while placed < NUM_ITEMS:
                key, place, committed = _place_round(items, placed, key, place, NUM_ITEMS, CAPACITY)
                placed += committed
                if committed < 6:  # many equal loads, or one outlier: serial steps cost less than such rounds
                    key, place = _place_each(items.sorted, items.item_at, placed, key, place, 32, NUM_ITEMS, CAPACITY)
                    placed += 32
        else:
            _place_each(items.sorted, items.item_at, 0, key, place, NUM_ITEMS, NUM_ITEMS, CAPACITY)
    tl.debug_barrier()


@triton.jit
def pack_spread(items, shape: tl.constexpr):
    """As `pack_plain`, but among packs of nearly equal load prefers one with fewer replicas of the item's expert,
    then fewer items; packs are scanned in index order, and the choice may drift."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    NUM_PACKS: tl.constexpr = shape.num_packs
    CAPACITY: tl.constexpr = NUM_ITEMS // NUM_PACKS
    if CAPACITY == 1 or NUM_PACKS == 1:
        pack_plain(items, shape)
    else:
        label_at_ptr = items.spare
        lane = tl.arange(0, shape.item_lanes)
        tl.store(items.sorted + lane, _sorted_items(items, shape), mask=lane < NUM_ITEMS)
        mean = ordered_sum(items.loads, NUM_ITEMS) / float64(1.0 * NUM_ITEMS)
        near = (float64(NEAR) * mean).to(tl.float32)
        tl.debug_barrier()
        pack = tl.arange(0, shape.pack_lanes)
        key = tl.where(pack < NUM_PACKS, tl.zeros_like(pack), HIGHEST)
        place = pack * CAPACITY
        # Keys are loaded two items ahead, labels one: a label's address waits for its key, 36 cycles each.
        following = tl.load(items.sorted)
        after_it = tl.load(items.sorted + 1)
        _, following_item = _unpack(following)
        following_label = tl.load(items.labels + following_item)
        for s in tl.range(0, NUM_ITEMS):
            load, item = _unpack(following)
            label = following_label
            following = after_it
            after_it = tl.load(items.sorted + s + 2, mask=s + 2 < NUM_ITEMS, other=0xFFFF)  # else item 0
            _, following_item = _unpack(following)
            following_label = tl.load(items.labels + following_item)
            lightest, chosen = smallest(key, place)
            floor = from_bits(lightest)
            held = from_bits(key)
            level = ((floor + near >= held) | (tl.abs(held - floor) <= near)) & (key < HIGHEST)
            # The lightest is one of them; counting all spares waiting for `chosen`: 2 reductions in a row, not 3.
            num_level = tl.sum(level.to(tl.int32), 0)
            # Without a rival, and where it is empty, the scan ends at the lightest pack.
            if (chosen % CAPACITY > 0) & (num_level > 1):
                chosen = _scan(label_at_ptr, label, key, place, level, near, pack, NUM_PACKS, CAPACITY)
            tl.store(items.item_at + chosen, item)
            tl.store(label_at_ptr + chosen, label)
            here = place == chosen
            fills = place % CAPACITY == CAPACITY - 1
            key = tl.where(here, tl.where(fills, HIGHEST, bits(held + load)), key)
            place = tl.where(here & (fills == 0), place + 1, place)
    tl.debug_barrier()


@triton.jit
def _scan(
    label_at_ptr,
    label,
    key,
    place,
    level,
    near,
    pack,
    NUM_PACKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The next place of the pack where a scan of the open packs in index order ends. Each round jumps to the next
    pack that replaces the choice, which is what scanning pack by pack does.

    A pack lighter than every one before it by more than `near` replaces whatever was chosen till then: where the first
    `level` pack (near the lightest) is one, the scan starts there. Without that a scan over loads that fall from pack
    to pack jumps at every pack, 94 times an item on 1,024 GPUs."""
    has_room = key < HIGHEST
    filled = place - pack * CAPACITY
    replicas = tl.zeros_like(pack)
    tl.debug_barrier()
    for k in tl.range(0, CAPACITY, loop_unroll_factor=4):
        there = (pack < NUM_PACKS) & (k < filled)
        replicas += (tl.load(label_at_ptr + pack * CAPACITY + k, mask=there, other=-1) == label).to(tl.int32)
    tl.debug_barrier()
    crowding = replicas * CAPACITY + filled  # filled stays below CAPACITY while there is room
    held = from_bits(key)
    first = tl.min(tl.where(has_room, pack, HIGHEST), 0)
    first_level = tl.min(tl.where(level, pack, HIGHEST), 0)
    before = from_bits(tl.min(tl.where(has_room & (pack < first_level), key, HIGHEST), 0))  # none: NaN, never above
    choice = tl.where(from_bits(at(key, pack, first_level)) + near < before, first_level, first)
    scanning = 1
    while scanning > 0:
        choice_load = from_bits(at(key, pack, choice))
        lighter = held + near < choice_load
        level = tl.abs(held - choice_load) <= near
        emptier = crowding < at(crowding, pack, choice)
        replaces = has_room & (pack > choice) & (lighter | (level & emptier))
        following = tl.min(tl.where(replaces, pack, HIGHEST), 0)
        scanning = (following < HIGHEST).to(tl.int32)
        choice = tl.where(following < HIGHEST, following, choice)
    return at(place, pack, choice)


@triton.jit
def _sorted_items(items, shape: tl.constexpr):
    """Items in stable descending order of load, each as one key of load and item; -1 beyond the last."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    item = tl.arange(0, shape.item_lanes)
    load = tl.load(items.loads + item, mask=item < NUM_ITEMS, other=0.0)
    key = (bits(load).to(tl.int64) << 32) | (0xFFFF - item).to(tl.int64)
    return sort_descending(tl.where(item < NUM_ITEMS, key, -1), items.sorted)


@triton.jit
def _unpack(key):
    """Load and item of a sorted key."""
    return from_bits((key >> 32).to(tl.int32)), 0xFFFF - (key & 0xFFFF).to(tl.int32)


@triton.jit
def _place_each(
    sorted_ptr,
    item_at_ptr,
    start,
    key,
    place,
    STEPS: tl.constexpr,
    NUM_ITEMS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One item a step. `key`: bits of the packs' loads, HIGHEST once full; `place`: the next slot of each,
    or its last slot once full.

    `place` rises with the pack's number, so its minimum is tie rule, destination and count in one. The next key is
    made before the reduction, which is what a step then waits for: about 90 cycles on sm_90 (estimate from SASS).
    Items are read four steps ahead: a first touch of a sector takes some 270 cycles."""
    last = place - place % CAPACITY + (CAPACITY - 1)
    item_0 = tl.load(sorted_ptr + start)
    item_1 = tl.load(sorted_ptr + start + 1)
    item_2 = tl.load(sorted_ptr + start + 2)
    item_3 = tl.load(sorted_ptr + start + 3)
    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        s = start + step
        load, item = _unpack(item_0)
        item_0 = item_1
        item_1 = item_2
        item_2 = item_3
        item_3 = tl.load(sorted_ptr + s + 4)
        fills = place == last
        new_key = tl.where(fills, HIGHEST, bits(from_bits(key) + load))
        _, chosen = smallest(key, place)
        tl.store(item_at_ptr + chosen, item, mask=s < NUM_ITEMS)
        here = place == chosen
        key = tl.where(here, new_key, key)
        place = tl.where(here & (fills == 0), place + 1, place)
    return key, place


@triton.jit
def _place_round(items, placed, key, place, NUM_ITEMS: tl.constexpr, CAPACITY: tl.constexpr):
    """The k-th lightest open pack takes the k-th next item, for all k at once; the choices before the first
    wrong one stand. A choice is wrong if a pack filled in this round would have been lighter again.

    New loads never fall below old ones, so comparing with the least new (load, place) finds exactly those."""
    rank = tl.arange(0, key.shape[0])
    both = ~sort_descending(~((key.to(tl.int64) << 32) | place.to(tl.int64)), items.keys)
    key = (both >> 32).to(tl.int32)
    place = (both & 0xFFFFFFFF).to(tl.int32)
    there = placed + rank < NUM_ITEMS
    load, item = _unpack(tl.load(items.sorted + placed + rank, mask=there, other=0))
    active = there & (key < HIGHEST)
    fills = place % CAPACITY == CAPACITY - 1
    new_key = tl.where(fills, HIGHEST, bits(from_bits(key) + load))
    least, least_place = smallest(tl.where(active, new_key, HIGHEST), place)
    right = active & ((key < least) | ((key == least) & (place <= least_place)))
    tl.store(items.item_at + place, item, mask=right)
    key = tl.where(right, new_key, key)
    place = tl.where(right & (fills == 0), place + 1, place)
    return key, place, tl.sum(right.to(tl.int32), 0)
