"""Partitions: the ways to split a few items into equal packs, as one table for planners and bounds."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb

from eplb_triton.constants import MOST_PARTITIONS

Partition = tuple[tuple[int, ...], ...]


@cache
def num_partitions(num_items: int, num_packs: int) -> int:
    """Ways to split `num_items` items into `num_packs` equal packs, whichever pack is which; where they are more than
    `MOST_PARTITIONS`, some number above it: of a million items the exact one has a million digits."""
    size, ways = num_items // num_packs, 1
    if size == 1:
        return 1
    for left in range(num_items, size, -size):
        if left - 1 > MOST_PARTITIONS:  # at least one of left - 1 others joins the lowest item left
            return left - 1
        ways *= comb(left - 1, size - 1)
        if ways > MOST_PARTITIONS:
            break
    return ways


@cache
def partitions_to_try(num_items: int, num_packs: int) -> tuple[Partition, ...]:
    """`all_partitions`, or none where they are more than `MOST_PARTITIONS`."""
    return all_partitions(num_items, num_packs) if num_partitions(num_items, num_packs) <= MOST_PARTITIONS else ()


@cache
def all_partitions(num_items: int, num_packs: int) -> tuple[Partition, ...]:
    """All of them in lexicographic order: items ascending in a pack, packs in the order of their lowest item."""
    size = num_items // num_packs
    if size == 1:
        return (tuple((item,) for item in range(num_items)),)
    found: list[tuple[Partition, tuple[int, ...]]] = [((), tuple(range(num_items)))]  # packs so far, items left
    for _ in range(num_packs):
        found = [
            ((*packs, (items[0], *others)), tuple(item for item in items[1:] if item not in others))
            for packs, items in found
            for others in combinations(items[1:], size - 1)
        ]
    return tuple(packs for packs, _ in found)
