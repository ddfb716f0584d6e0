"""Partitions: the ways to split a few items into equal packs, as one table for planners and bounds."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb

from eplb_triton.constants import MOST_PARTITIONS


@cache
def num_partitions(num_items: int, num_packs: int) -> int:
    """Ways to split `num_items` items into `num_packs` equal packs, whichever pack is which."""
    size, ways = num_items // num_packs, 1
    for left in range(num_items, 0, -size):
        ways *= comb(left - 1, size - 1)  # what joins the lowest item left
    return ways


@cache
def partitions_to_try(num_items: int, num_packs: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """`all_partitions`, or none where they are more than `MOST_PARTITIONS`."""
    return all_partitions(num_items, num_packs) if num_partitions(num_items, num_packs) <= MOST_PARTITIONS else ()


@cache
def all_partitions(num_items: int, num_packs: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All of them in lexicographic order: items ascending in a pack, packs in the order of their lowest item."""
    size = num_items // num_packs

    def split(items: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
        if not items:
            return [()]
        found: list[tuple[tuple[int, ...], ...]] = []
        for others in combinations(items[1:], size - 1):
            left = tuple(item for item in items[1:] if item not in others)
            found += [((items[0], *others), *further) for further in split(left)]
        return found

    return tuple(split(tuple(range(num_items))))
