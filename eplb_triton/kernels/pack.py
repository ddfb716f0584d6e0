"""Pack items into packs of equal size (SPEC: heaviest first, each into the lightest pack that has room)."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import (
    HIGHEST,
    at,
    bits,
    float64,
    from_bits,
    ordered_sum,
    smallest,
)


@triton.jit
def pack_plain(
    loads_ptr,  # float32 [NUM_ITEMS]
    item_at_ptr,  # int32 [NUM_ITEMS], out: item in slot k of pack q at q * capacity + k
    sorted_ptr,  # int64 [NUM_ITEMS + 40], scratch
    NUM_ITEMS: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
    IN_ROUNDS: tl.constexpr,
):
    """Each item, heaviest first, goes to the open pack of smallest load. Ties: lowest item, lowest pack."""
    CAPACITY: tl.constexpr = NUM_ITEMS // NUM_PACKS
    item = tl.arange(0, ITEMS)
    if CAPACITY == 1:
        tl.store(item_at_ptr + item, item, mask=item < NUM_ITEMS)
    elif NUM_PACKS == 1:
        _, sorted_item = _unpack(_sorted_items(loads_ptr, NUM_ITEMS, ITEMS))
        tl.store(item_at_ptr + item, sorted_item, mask=item < NUM_ITEMS)
    else:
        tl.store(sorted_ptr + item, _sorted_items(loads_ptr, NUM_ITEMS, ITEMS), mask=item < NUM_ITEMS)
        tl.debug_barrier()
        pack = tl.arange(0, PACKS)
        key = tl.where(pack < NUM_PACKS, tl.zeros((PACKS,), tl.int32), HIGHEST)
        place = pack * CAPACITY
        if IN_ROUNDS:
            placed = 0
            while placed < NUM_ITEMS:
                key, place, committed = _place_round(
                    sorted_ptr, item_at_ptr, placed, key, place, NUM_ITEMS, CAPACITY, PACKS
                )
                placed += committed
                if committed < 6:  # many equal loads, or one outlier: serial steps cost less than such rounds
                    key, place = _place_each(sorted_ptr, item_at_ptr, placed, key, place, 32, NUM_ITEMS, CAPACITY)
                    placed += 32
        else:
            _place_each(sorted_ptr, item_at_ptr, 0, key, place, NUM_ITEMS, NUM_ITEMS, CAPACITY)
    tl.debug_barrier()


@triton.jit
def pack_spread(
    loads_ptr,  # float32 [NUM_ITEMS]
    labels_ptr,  # int32 [NUM_ITEMS], expert of each item
    item_at_ptr,  # int32 [NUM_ITEMS], out: item in slot k of pack q at q * capacity + k
    sorted_ptr,  # int64 [NUM_ITEMS + 40], scratch
    label_at_ptr,  # int32 [NUM_ITEMS], scratch
    NUM_ITEMS: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    ITEMS: tl.constexpr,
    PACKS: tl.constexpr,
):
    """As `pack_plain`, but among packs of nearly equal load prefers one with fewer replicas of the item's expert,
    then fewer items; packs are scanned in index order, and the choice may drift."""
    CAPACITY: tl.constexpr = NUM_ITEMS // NUM_PACKS
    if CAPACITY == 1 or NUM_PACKS == 1:
        pack_plain(loads_ptr, item_at_ptr, sorted_ptr, NUM_ITEMS, NUM_PACKS, ITEMS, PACKS, False)
    else:
        lane = tl.arange(0, ITEMS)
        tl.store(sorted_ptr + lane, _sorted_items(loads_ptr, NUM_ITEMS, ITEMS), mask=lane < NUM_ITEMS)
        mean = ordered_sum(loads_ptr, NUM_ITEMS) / float64(1.0 * NUM_ITEMS)
        near = (float64(1e-6) * mean).to(tl.float32)
        tl.debug_barrier()
        pack = tl.arange(0, PACKS)
        key = tl.where(pack < NUM_PACKS, tl.zeros((PACKS,), tl.int32), HIGHEST)
        place = pack * CAPACITY
        following = tl.load(sorted_ptr)
        _, following_item = _unpack(following)
        following_label = tl.load(labels_ptr + following_item)
        for s in tl.range(0, NUM_ITEMS):
            load, item = _unpack(following)
            label = following_label
            following = tl.load(sorted_ptr + s + 1, mask=s + 1 < NUM_ITEMS, other=0xFFFF)  # else item 0
            _, following_item = _unpack(following)
            following_label = tl.load(labels_ptr + following_item)
            lightest, chosen = smallest(key, place)
            floor = from_bits(lightest)
            held = from_bits(key)
            rival = (floor + near >= held) | (tl.abs(held - floor) <= near)
            rival = rival & (key < HIGHEST) & (place != chosen)
            # Without a rival, and where it is empty, the scan ends at the lightest pack.
            if (chosen % CAPACITY > 0) & (tl.max(rival.to(tl.int32), 0) > 0):
                chosen = _scan(label_at_ptr, label, key, place, near, pack, NUM_PACKS, CAPACITY, PACKS)
            tl.store(item_at_ptr + chosen, item)
            tl.store(label_at_ptr + chosen, label)
            here = place == chosen
            fills = place % CAPACITY == CAPACITY - 1
            key = tl.where(here, tl.where(fills, HIGHEST, bits(held + load)), key)
            place = tl.where(here & (fills == 0), place + 1, place)
    tl.debug_barrier()


@triton.jit
def _scan(
    label_at_ptr, label, key, place, near, pack, NUM_PACKS: tl.constexpr, CAPACITY: tl.constexpr, PACKS: tl.constexpr
):
    """The next place of the pack where a scan of the open packs in index order ends. Each round jumps to the next
    pack that replaces the choice, which is what scanning pack by pack does."""
    has_room = key < HIGHEST
    filled = place - pack * CAPACITY
    replicas = tl.zeros((PACKS,), tl.int32)
    tl.debug_barrier()
    for k in tl.range(0, CAPACITY, loop_unroll_factor=4):
        there = (pack < NUM_PACKS) & (k < filled)
        replicas += (tl.load(label_at_ptr + pack * CAPACITY + k, mask=there, other=-1) == label).to(tl.int32)
    tl.debug_barrier()
    crowding = replicas * CAPACITY + filled  # filled stays below CAPACITY while there is room
    held = from_bits(key)
    choice = tl.min(tl.where(has_room, pack, HIGHEST), 0)
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
def _sorted_items(loads_ptr, NUM_ITEMS: tl.constexpr, ITEMS: tl.constexpr):
    """Items in stable descending order of load, each as one key of load and item; -1 beyond the last."""
    item = tl.arange(0, ITEMS)
    load = tl.load(loads_ptr + item, mask=item < NUM_ITEMS, other=0.0)
    key = (bits(load).to(tl.int64) << 32) | (0xFFFF - item).to(tl.int64)
    return tl.sort(tl.where(item < NUM_ITEMS, key, -1), 0, descending=True)


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
def _place_round(
    sorted_ptr,
    item_at_ptr,
    placed,
    key,
    place,
    NUM_ITEMS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PACKS: tl.constexpr,
):
    """The k-th lightest open pack takes the k-th next item, for all k at once; the choices before the first
    wrong one stand. A choice is wrong if a pack filled in this round would have been lighter again.

    New loads never fall below old ones, so comparing with the least new (load, place) finds exactly those."""
    rank = tl.arange(0, PACKS)
    both = tl.sort((key.to(tl.int64) << 32) | place.to(tl.int64), 0)
    key = (both >> 32).to(tl.int32)
    place = (both & 0xFFFFFFFF).to(tl.int32)
    there = placed + rank < NUM_ITEMS
    load, item = _unpack(tl.load(sorted_ptr + placed + rank, mask=there, other=0))
    active = there & (key < HIGHEST)
    fills = place % CAPACITY == CAPACITY - 1
    new_key = tl.where(fills, HIGHEST, bits(from_bits(key) + load))
    least, least_place = smallest(tl.where(active, new_key, HIGHEST), place)
    right = active & ((key < least) | ((key == least) & (place <= least_place)))
    tl.store(item_at_ptr + place, item, mask=right)
    key = tl.where(right, new_key, key)
    place = tl.where(right & (fills == 0), place + 1, place)
    return key, place, tl.sum(right.to(tl.int32), 0)
