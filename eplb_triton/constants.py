"""The numbers of the specification, and the formulas over counts that every backend needs: each stands here once.

Plain Python numbers and functions of integers, so that PyTorch, Numba and Triton can all take them. A change of any of
them is a change of plans.
"""

from __future__ import annotations

SPEC_VERSION = 2
"""Of docs/spec.md: grows whenever any plan may change by one bit. Ranks compare it before they move weights."""

MAX_LOAD = 2.0**100
"""Largest load accepted: sums of any number of experts stay finite in float32."""

EPSILON = 1e-12
"""What two float64 (or float32) figures must differ by to differ, and the least mean that anything is divided by."""

LEVEL = 1e-9
"""Difference of loads, in tokens, below which two packs count as level, and a swap as no gain."""

# Counts
VARIATION_RANGE = (0.7, 1.3)
"""What the mean coefficient of variation is held between before it scales the tail of `dispersion`."""
BISECTIONS = 40
"""Of the level in `waterfill`."""
PAIR_GAIN = 1e-6
"""Of the largest pair: a smaller gain of a paired fix-up is none."""

# Packing
NEAR = 1e-6
"""Of the mean item load: packs this near to each other are equal to `spread`."""
MOST_PARTITIONS = 1000
"""Tried one by one up to here: of 8 groups on 4 nodes there are 105; of 12 on 4: 15,400."""

# Swaps
UNBALANCED_AT_START = 0.02
"""Spread of pack loads over their mean from which `corner` takes one step more on GPUs."""
UNBALANCED_AFTER_STEP = 0.03
"""And from which a single step may be followed by a second."""
GOOD_SWAP = 0.8
"""Share of the difference that may stay after a swap for `corner` to be content with it."""

# Fixed point and exchanges
LOAD_BITS = 28
"""A full pack stays below 2**28: two of them and two penalties fit an int32. The largest load of a history becomes
2**28 to 2**29 - 1."""
PENALTY = 1 << LOAD_BITS
"""Added to what must not be chosen: above every load."""
PACKS_PER_PROPOSER = 8
"""From 32 packs up a match round repairs a share of them, not a number."""
EXCHANGES_PER_ITEM = 4
"""Of the rounds that follow a packing of groups that is not known to be the best."""

# Replanning
NEWEST_STEPS = 4096
"""Steps of a history that count: sums of loads of 29 bits then stay below 2**41, times 2**20 below 2**61."""
LOAD_UNITS = 1 << 20
"""W: what the loads of one step add up to after scaling."""
POWER_BITS = 30
"""A score equal to the largest has the power 2**30."""
POWER_LIMIT = 1 << 46
"""Power of a score above the largest."""
MOST_FLOOR = 2.0**62
"""Of what a move must gain."""
Z_UNITS = 65536
"""Parts of one that z is rounded to."""


def tenth(num_redundant: int) -> int:
    """A tenth of the redundant replicas, rounded up, at least 1: the length of a fixed tail."""
    return max(1, (num_redundant + 9) // 10)


def simulated_lengths(num_redundant: int) -> list[int]:
    """The tail lengths that `simulated` tries, shortest first: the fixed one and its two neighbours."""
    fixed = tenth(num_redundant)
    return sorted({max(1, fixed - 1), fixed, min(num_redundant, fixed + 1)})


def dispersion_length(num_redundant: int, variation: float) -> int:
    """A tenth of the redundant replicas times the mean coefficient of variation, rounded half to even, 1 to all."""
    least, most = VARIATION_RANGE
    return min(max(round(0.10 * num_redundant * min(max(variation, least), most)), 1), num_redundant)


def waterfill_tail(num_redundant: int) -> int:
    """How many of what the level leaves over go one by one: a tenth of the redundant replicas, half to even, from 1."""
    return max(1, round(0.1 * num_redundant))


def replica_cap(num_replicas: int, num_experts: int, num_packs: int) -> int:
    """The most replicas of an expert in `capped` counts: one a GPU, or any number where that cannot hold them all."""
    return num_packs if num_replicas <= num_experts * num_packs else num_replicas


def num_proposers(proposers: int, num_packs: int) -> int:
    """Packs that propose in a match round: at least `proposers`, an eighth of many packs, at most half of all."""
    return min(max(proposers, num_packs // PACKS_PER_PROPOSER), num_packs // 2)


def num_partners(candidates: int, capacity: int, num_packs: int) -> int:
    """Lightest packs met in a double step: as many as `candidates` pairs of pairs allow; 0 leaves the step out."""
    pairs = capacity * (capacity - 1) // 2
    return min(num_packs - 1, candidates // (pairs * pairs)) if pairs else 0
