"""Pairing: with two slots a GPU, the load that no replica counts can be paired below. Needs SciPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from eplb_triton.topology import Topology

PRECISION = 1e-5  # of the bound, relative
MISSED = 1e-6  # of a replica: what the solver may miss a constraint by
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def pairing_bound(loads: Doubles, topology: Topology, least: float) -> float:
    """The largest load, to PRECISION, that no pairing of any fractional counts reaches; at least `least`.

    Args:
        loads: [E] float64, one layer.
        topology: two slots a GPU.
        least: a lower bound known already.
    """
    if least == 0 or not _too_low(loads, topology.num_replicas, least):
        return least
    low, high = least, 1.01 * least
    while _too_low(loads, topology.num_replicas, high):
        low, high = high, 1.5 * high - 0.5 * least
    while high - low > PRECISION * low:
        middle = (low + high) / 2
        if _too_low(loads, topology.num_replicas, middle):
            low = middle
        else:
            high = middle
    return low


def _too_low(loads: Doubles, num_replicas: int, peak: float) -> bool:
    """Whether no fractional counts can be paired with every pair at most `peak`.

    A replica heavier than peak / 2 needs a partner of at most peak - its load, each its own. So for every such load a,
    replicas of at least a are no more than replicas of at most peak - a. A linear program finds the counts that miss
    this by the least; missing it by more than MISSED proves `peak` too low.

    Its variables: how much of each expert has each count; the balance (partners less heavy replicas) at each heavy
    load, from the heaviest down, each from the one before; the miss.
    """
    choice, num_steps = _choices(loads, num_replicas, peak)
    num_experts, num_choices = len(loads), len(choice.expert)
    column, step = np.arange(num_choices), np.arange(num_steps)
    paired = choice.step < num_steps  # the others are light, but the partner of none
    balance, miss = num_choices + step, num_choices + num_steps
    share_row, total_row, first_step = 0, num_experts, num_experts + 1
    entries = [
        (share_row + choice.expert, column, np.ones(num_choices)),
        (np.full(num_choices, total_row), column, choice.replicas),
        (first_step + choice.step[paired], column[paired], (choice.sign * choice.replicas)[paired]),
        (first_step + step, balance, -np.ones(num_steps)),
        (first_step + step[1:], balance[:-1], np.ones(max(num_steps - 1, 0))),
    ]
    row, at, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    equal = csr_array((value, (row, at)), shape=(first_step + num_steps, miss + 1))
    right = np.concatenate((np.ones(num_experts), [num_replicas], np.zeros(num_steps)))
    # balance + miss >= 0 at every step
    covered = csr_array(
        (-np.ones(2 * num_steps), (np.tile(step, 2), np.concatenate((balance, np.full(num_steps, miss))))),
        shape=(num_steps, miss + 1),
    )
    cost = np.zeros(miss + 1)
    cost[miss] = 1
    limits = np.stack((np.zeros(miss + 1), np.full(miss + 1, np.inf)), 1)
    limits[balance, 0] = -np.inf
    solved = linprog(cost, covered, np.zeros(num_steps), equal, right, limits, method="highs")
    infeasible = 2
    return bool(solved.status == infeasible or (solved.status == 0 and solved.fun > MISSED))


class _Choices(NamedTuple):
    """What an expert may be given, [choices] each."""

    expert: Integers
    replicas: Integers
    step: Integers  # the first heavy load, from the heaviest down, that a replica is at least, or may be the partner of
    sign: Integers  # -1 for a replica above peak / 2, else 1


def _choices(loads: Doubles, num_replicas: int, peak: float) -> tuple[_Choices, int]:
    """All counts that leave no replica above `peak`, and the number of steps.

    Of the counts of an expert that enter at the same step only the first and last are kept: a fractional choice of the
    two makes any between them.
    """
    counts = np.arange(1, num_replicas - len(loads) + 2)
    share = loads[:, None] / counts  # [E, counts]
    heavy = np.unique(share[(share > peak / 2) & (share <= peak)])[::-1]
    step = np.where(
        share > peak / 2,
        np.searchsorted(-heavy, -share, side="left"),
        np.searchsorted(peak - heavy, share, side="left"),
    )
    sign = np.where(share > peak / 2, -1, 1)
    change = (step[:, 1:] != step[:, :-1]) | (sign[:, 1:] != sign[:, :-1])
    edge = np.ones((len(loads), 1), dtype=bool)
    extreme = np.hstack((edge, change)) | np.hstack((change, edge))
    expert, at = np.nonzero((share <= peak) & extreme)
    return _Choices(expert, counts[at], step[expert, at], sign[expert, at]), len(heavy)
