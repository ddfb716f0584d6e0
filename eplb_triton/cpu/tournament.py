"""A tournament: the largest of many keys, kept while single keys change, and the same over quotients."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import LAST_INDEX, Floats, Ints, divide, ordered_bits, value_of
from eplb_triton.cpu.compiled import inlined, stage

Divisor = tuple[np.int64, np.int64]

BRANCHES = 16  # children of a tournament node: their largest takes two 512-bit or four 256-bit compares
NO_KEY = np.int64(-0x8000000000000000)  # below every key: an empty leaf, a full pack

# Quotients w / (times * c + plus), as (times, plus). As int64s and not literals, here and wherever a constant is
# an argument: Numba would compile the callee once more for every literal.
DHONDT = (np.int64(1), np.int64(0))
SAINTE_LAGUE = (np.int64(2), np.int64(-1))
NEXT_DHONDT = (np.int64(1), np.int64(1))
NEXT_SAINTE_LAGUE = (np.int64(2), np.int64(1))


@stage
def _tree_blocks(num_leaves: int) -> int:
    """Blocks of BRANCHES keys that a tournament over so many leaves has, all levels together."""
    level = (num_leaves + BRANCHES - 1) // BRANCHES
    blocks = level
    while level > 1:
        level = (level + BRANCHES - 1) // BRANCHES
        blocks += level
    return blocks


@stage
def new_trees(num_trees: int, num_leaves: int) -> Ints:
    """Room for tournaments: [num_trees, blocks, BRANCHES]."""
    return np.empty((num_trees, _tree_blocks(num_leaves), BRANCHES), np.int64)


@stage
def _largest(tree: Ints, block: int) -> int:
    best: int = tree[block, 0]
    for k in range(1, BRANCHES):
        best = max(best, tree[block, k])
    return best


@stage
def build_tree(tree: Ints, num_leaves: int) -> int:
    """Play the tournament over the keys in the first `num_leaves` leaves of `tree`; the largest key.

    Leaf i is tree[i // BRANCHES, i % BRANCHES]; a level's winners are the next level's leaves. Keys are
    distinct, for they carry the index, in the order of the tie rule.
    """
    first, leaves = np.int64(0), num_leaves
    while True:
        blocks = (leaves + BRANCHES - 1) // BRANCHES
        for i in range(leaves, blocks * BRANCHES):
            tree[first + i // BRANCHES, i % BRANCHES] = NO_KEY
        if blocks == 1:
            return _largest(tree, first)
        for block in range(blocks):
            above = first + blocks + block // BRANCHES
            tree[above, block % BRANCHES] = _largest(tree, first + block)
        first += blocks
        leaves = blocks


@inlined
def replace_leaf(tree: Ints, num_leaves: int, leaf: int, key: int) -> int:
    """Give `leaf` a new key and replay its matches; the largest key."""
    first, blocks = 0, (num_leaves + BRANCHES - 1) // BRANCHES
    while True:
        block = leaf // BRANCHES
        tree[first + block, leaf % BRANCHES] = key
        key = _largest(tree, first + block)
        if blocks == 1:
            return key
        leaf = block
        first += blocks
        blocks = (blocks + BRANCHES - 1) // BRANCHES


@stage
def _expert_key(loads: Floats, counts: Ints, divisor: Divisor, expert: int) -> int:
    """A key that is larger for a larger quotient; ties: lowest expert."""
    times, plus = divisor
    replica_load = divide(loads[expert], times * counts[expert] + plus)
    return (ordered_bits(replica_load) << 32) | (LAST_INDEX - expert)


@stage
def fill_quotients(loads: Floats, counts: Ints, divisor: Divisor, tree: Ints) -> int:
    """Start a tournament of the experts' quotients; the winning key."""
    for i in range(loads.size):
        tree[i // BRANCHES, i % BRANCHES] = _expert_key(loads, counts, divisor, i)
    return build_tree(tree, loads.size)


@inlined
def refresh_quotient(loads: Floats, counts: Ints, divisor: Divisor, tree: Ints, expert: int) -> int:
    """Bring a tournament of quotients up to date after counts[expert] changed; the winning key."""
    return replace_leaf(tree, loads.size, expert, _expert_key(loads, counts, divisor, expert))


@stage
def key_expert(key: int) -> int:
    return LAST_INDEX - (key & LAST_INDEX)


@stage
def key_load(key: int) -> np.float32:
    return value_of(key >> 32)


@stage
def largest_two(top: int, tree: Ints, num_experts: int) -> tuple[np.float32, np.float32]:
    """The largest and second largest quotient of a tournament won by `top`, the largest twice if it is alone.

    Takes the winner out: refresh it before the next use.
    """
    largest = key_load(top)
    if num_experts == 1:
        return largest, largest
    return largest, key_load(replace_leaf(tree, num_experts, key_expert(top), NO_KEY))
