"""Pack: items of descending load onto packs of equal size.

loads [n] float32 of the items; pack and slot [n] int64 of each item, filled; work (see new_work) and
tree [blocks, BRANCHES] int64 are scratch.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.constants import NEAR
from eplb_triton.cpu.arith import LAST_INDEX, Floats, Ints, descending_order, ordered_bits, ordered_sum, value_of
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.tournament import BRANCHES, NO_KEY, build_tree, replace_leaf

FULL = np.float32(np.inf)  # the load of a full pack: nothing is near it
INDEX_BITS = 21  # of replicas held, items and pack in one key: rows of up to 2 million replicas
INDEX_MASK = (1 << INDEX_BITS) - 1
NO_CHOICE = np.int64(0x7FFFFFFFFFFFFFFF)


@stage
def _one_item_each(pack: Ints, slot: Ints) -> None:
    for i in range(pack.size):
        pack[i] = i
        slot[i] = 0


@stage
def _lightness(load: np.float32, pack: int) -> int:
    """A key that is larger for a lighter pack; ties: lowest pack."""
    return ~((ordered_bits(load) << 32) | pack)


@stage
def _all_empty(tree: Ints, num_packs: int) -> int:
    """Start a tournament of empty packs, the lightest on top."""
    for q in range(num_packs):
        tree[q // BRANCHES, q % BRANCHES] = _lightness(np.float32(0), q)
    return build_tree(tree, num_packs)


@stage
def pack_plain(loads: Floats, num_packs: int, pack: Ints, slot: Ints, work: Ints, tree: Ints) -> None:
    """Fill pack and slot of each item: heaviest item first, to the open pack of smallest load; ties: lowest."""
    capacity = loads.size // num_packs
    if capacity == 1:
        _one_item_each(pack, slot)
        return
    order, items = descending_order(loads, work), work[-num_packs:]
    items[:] = 0
    top = _all_empty(tree, num_packs)
    for k in range(loads.size):
        item = order[k]
        lightest = ~top & LAST_INDEX
        pack[item] = lightest
        slot[item] = items[lightest]
        items[lightest] += 1
        load = value_of(~top >> 32) + loads[item]
        key = _lightness(load, lightest) if items[lightest] < capacity else NO_KEY
        top = replace_leaf(tree, num_packs, lightest, key)


@stage
def pack_spread(
    loads: Floats,
    labels: Ints,
    num_packs: int,
    pack: Ints,
    slot: Ints,
    work: Ints,
    tree: Ints,
    held: Ints,
    pack_loads: Floats,
) -> None:
    """As `pack_plain`, but among packs whose loads differ by at most a millionth of the mean item load, to the
    one with fewer replicas of the item's expert, then fewer items.

    labels [items] is the expert of each item; held [experts, packs], all 0 before and after, counts the replicas
    of an expert in a pack; pack_loads [packs] is scratch. Packs are scanned from the first, and each is compared
    with the choice so far, so the choice may drift by more than the tolerance.
    """
    n = loads.size
    capacity = n // num_packs
    if capacity == 1:
        _one_item_each(pack, slot)
        return
    order, items = descending_order(loads, work), work[-num_packs:]
    tolerance = np.float32(NEAR * (ordered_sum(loads) / n))
    items[:] = 0
    pack_loads[:] = np.float32(0)
    top = _all_empty(tree, num_packs)
    for k in range(n):
        item = order[k]
        lightest = pack_loads[~top & LAST_INDEX]
        choice = _choice_of_tied(pack_loads, items, held[labels[item]], lightest, tolerance)
        if choice < 0:
            choice = _choice_of_scan(pack_loads, items, held[labels[item]], tolerance)
        pack[item] = choice
        slot[item] = items[choice]
        items[choice] += 1
        held[labels[item], choice] += 1
        if items[choice] < capacity:
            pack_loads[choice] += loads[item]
            key = _lightness(pack_loads[choice], choice)
        else:
            pack_loads[choice] = FULL
            key = NO_KEY
        top = replace_leaf(tree, num_packs, choice, key)
    for item in range(n):
        held[labels[item], pack[item]] = 0


@stage
def _choice_of_scan(pack_loads: Floats, items: Ints, held: Ints, tolerance: np.float32) -> int:
    """The choice among the packs that are not full, with the drift of a scan; held [packs] is the expert's."""
    choice: int = np.int64(-1)
    for q in range(pack_loads.size):
        if pack_loads[q] == FULL:
            continue
        if choice < 0 or pack_loads[q] + tolerance < pack_loads[choice]:
            choice = q
        elif abs(pack_loads[q] - pack_loads[choice]) <= tolerance:
            fewer = held[q] - held[choice]
            if fewer < 0 or (fewer == 0 and items[q] < items[choice]):
                choice = q
    return choice


@stage
def _choice_of_tied(pack_loads: Floats, items: Ints, held: Ints, lightest: np.float32, tolerance: np.float32) -> int:
    """The end of `_choice_of_scan` where the packs near the lightest load have exactly that load, else -1.

    Let c - lightest > tolerance and lightest + tolerance < c for every other load c (both, for in float32 each
    can hold without the other). Then the scan takes the first lightest pack when it comes to it, whatever it had,
    and no c ever replaces one; between equal loads the smallest (held, items) wins, the first of equals. That is
    almost every item: the packs are empty, or replicas of one expert made their loads equal. Nothing here
    depends on order, so it vectorises; the scan does not, and took 4 times as long with 128 packs.
    """
    near, tied = 0, 0
    best: int = NO_CHOICE
    for q in range(pack_loads.size):
        load = pack_loads[q]
        near += not (load - lightest > tolerance and lightest + tolerance < load)
        tied += load == lightest
        key = (held[q] << 2 * INDEX_BITS) | (items[q] << INDEX_BITS) | q
        best = min(best, key if load == lightest else NO_CHOICE)
    return best & INDEX_MASK if near == tied else np.int64(-1)
