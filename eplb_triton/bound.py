"""The load below which no placement can bring the heaviest GPU of a layer: what a plan is measured against.

docs/policies.md has the proof of every part.
"""

from __future__ import annotations

from itertools import combinations
from math import comb, factorial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eplb_triton.topology import Topology

MOST_PARTITIONS = 1000  # of groups into nodes: tried one by one up to here
PRECISION = 1e-5  # of the bound by linear programming, relative
Doubles = NDArray[np.float64]


def lower_bound(weight: Tensor, topology: Topology, *, pairing: bool = True) -> Tensor:
    """A load that the heaviest GPU of each layer has in every placement, whatever planned it.

    The largest of: the mean GPU load; in hierarchical planning, of the best partition of the groups into nodes, the
    mean GPU load of its heaviest node (exact up to 1,000 partitions); the largest replica that any counts must leave
    (exact with one slot a GPU); with two slots a GPU, what the best pairing of any fractional counts leaves.

    Args:
        weight: [L, E], load of each logical expert.
        topology: replicas, groups, nodes and GPUs.
        pairing: whether to solve the linear programs for two slots a GPU: some 0.2 s a layer of 256 experts.

    Returns:
        [L] float64 on the CPU.

    Raises:
        ImportError: two slots a GPU and SciPy is missing: `pip install eplb-triton[bound]`, or `pairing=False`.
        ValueError: `weight` is not [layers, experts] or the topology does not fit it.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be 2-D: [layers, experts]")
    topology.check_experts(weight.shape[1])
    loads = weight.detach().to("cpu", torch.float64)
    bound = torch.maximum(loads.sum(1) / topology.num_gpus, _largest_replica(loads, topology.num_replicas))
    if topology.planned_nodes > 1:
        bound = torch.maximum(bound, _node_bound(loads, topology))
    if topology.slots_per_gpu == 2 and pairing:
        layers = [_pairing_bound(row.numpy(), topology, float(least)) for row, least in zip(loads, bound, strict=True)]
        bound = torch.tensor(layers, dtype=torch.float64)
    return bound


def _largest_replica(loads: Tensor, num_replicas: int) -> Tensor:
    """[rows]: smallest possible largest w/c over all counts that sum to `num_replicas`, which D'Hondt's have."""
    counts = torch.ones_like(loads)
    share = loads.clone()
    for _ in range(num_replicas - loads.shape[1]):
        heaviest = share.argmax(1, keepdim=True)
        counts.scatter_add_(1, heaviest, torch.ones_like(share[:, :1]))
        share.scatter_(1, heaviest, loads.gather(1, heaviest) / counts.gather(1, heaviest))
    return share.amax(1)


def _node_bound(loads: Tensor, topology: Topology) -> Tensor:
    """[L]: the best that any partition of the groups into nodes leaves the GPUs of its worst node."""
    num_groups, num_nodes, gpus = topology.num_groups, topology.num_nodes, topology.gpus_per_node
    size = num_groups // num_nodes
    groups = loads.view(len(loads), num_groups, -1)
    if _num_partitions(num_groups, num_nodes) > MOST_PARTITIONS:
        return _crowded_node(groups.sum(2), num_nodes) / gpus
    subsets = list(combinations(range(num_groups), size))
    experts = groups[:, torch.tensor(subsets)].flatten(2)  # [L, subsets, e]
    level = _largest_replica(experts.flatten(0, 1), topology.replicas_per_node).view(experts.shape[:2])
    of_subset = torch.maximum(experts.sum(2) / gpus, level)
    best = torch.full_like(loads[:, 0], torch.inf)
    for partition in _partitions(tuple(range(num_groups)), size):
        best = torch.minimum(best, of_subset[:, [subsets.index(node) for node in partition]].amax(1))
    return best


def _crowded_node(groups: Tensor, num_nodes: int) -> Tensor:
    """[L]: load that some node has in every partition of `groups` [L, G]: the heaviest group with the lightest others;
    two of the N + 1 heaviest, which cannot all be apart, with the lightest others."""
    size = groups.shape[1] // num_nodes
    ordered = groups.sort(dim=1, descending=True).values
    crowded = ordered[:, 0] + ordered[:, groups.shape[1] - size + 1 :].sum(1)
    if size > 1:
        two = ordered[:, num_nodes - 1] + ordered[:, num_nodes]
        crowded = torch.maximum(crowded, two + ordered[:, groups.shape[1] - size + 2 :].sum(1))
    return crowded


def _num_partitions(num_groups: int, num_nodes: int) -> int:
    return factorial(num_groups) // (factorial(num_groups // num_nodes) ** num_nodes * factorial(num_nodes))


def _partitions(groups: tuple[int, ...], size: int) -> list[list[tuple[int, ...]]]:
    """All partitions of `groups` into sets of `size`."""
    if not groups:
        return [[]]
    found: list[list[tuple[int, ...]]] = []
    for others in combinations(groups[1:], size - 1):
        left = tuple(group for group in groups[1:] if group not in others)
        found += [[(groups[0], *others), *further] for further in _partitions(left, size)]
    return found


def _pairing_bound(loads: Doubles, topology: Topology, least: float) -> float:
    """Largest load, to PRECISION, that is too low for the pairing of any fractional counts; at least `least`."""
    try:
        import scipy.optimize  # noqa: PLC0415, F401 - an optional extra
    except ImportError:
        raise ImportError(
            "lower_bound with two slots a GPU needs SciPy: pip install eplb-triton[bound], or pass pairing=False"
        ) from None
    if least == 0 or not _too_low(loads, topology, least):
        return least
    low, high = least, 1.01 * least
    while _too_low(loads, topology, high):
        low, high = high, 1.5 * high - 0.5 * least
    while high - low > PRECISION * low:
        middle = (low + high) / 2
        if _too_low(loads, topology, middle):
            low = middle
        else:
            high = middle
    return low


def _too_low(loads: Doubles, topology: Topology, peak: float) -> bool:
    """Whether no fractional counts can be paired with every pair at most `peak`.

    A replica heavier than peak / 2 needs a partner of at most peak - load, each its own. So for every such load a,
    replicas of at least a must be no more than replicas of at most peak - a. A linear program finds the counts that
    miss this by the least; missing it by more than 1e-6 of a replica proves `peak` too low.
    """
    from scipy.optimize import linprog  # noqa: PLC0415
    from scipy.sparse import coo_array  # noqa: PLC0415

    num_experts, most = len(loads), topology.num_replicas - len(loads) + 1
    counts = np.arange(1, most + 1)
    share = loads[:, None] / counts  # [E, most]
    heavy = np.unique(share[(share > peak / 2) & (share <= peak)])[::-1]  # descending: partners ascend
    num_steps = len(heavy)
    # The step at which a replica enters its chain: the first heavy load that it is at least, or may be the partner of.
    step = np.where(
        share > peak / 2,
        np.searchsorted(-heavy, -share, side="left"),
        np.searchsorted(peak - heavy, share, side="left"),
    )
    sign = np.where(share > peak / 2, -1, 1)
    expert, at = np.nonzero((share <= peak) & _extreme(step, sign))
    columns, steps, count = np.arange(len(expert)), step[expert, at], counts[at]
    inside = steps < num_steps
    num_columns = len(expert) + num_steps + 1  # choices; the running balance at each step; the miss
    balance = len(expert) + np.arange(num_steps)
    equal = coo_array(
        (
            np.concatenate((np.ones(len(expert)), count, (count * sign[expert, at])[inside], -np.ones(num_steps), np.ones(num_steps - 1))),
            (
                np.concatenate((expert, np.full(len(expert), num_experts), num_experts + 1 + steps[inside], num_experts + 1 + np.arange(num_steps), num_experts + 2 + np.arange(num_steps - 1))),
                np.concatenate((columns, columns, columns[inside], balance, balance[:-1])),
            ),
        ),
        shape=(num_experts + 1 + num_steps, num_columns),
    )
    right = np.concatenate((np.ones(num_experts), [topology.num_replicas], np.zeros(num_steps)))
    unequal = coo_array(
        (-np.ones(2 * num_steps), (np.tile(np.arange(num_steps), 2), np.concatenate((balance, np.full(num_steps, num_columns - 1))))),
        shape=(num_steps, num_columns),
    )
    cost = np.zeros(num_columns)
    cost[-1] = 1
    limits = np.zeros((num_columns, 2))
    limits[:, 1] = np.inf
    limits[balance, 0] = -np.inf
    solved = linprog(cost, unequal.tocsr(), np.zeros(num_steps), equal.tocsr(), right, limits, method="highs")
    return solved.status == 2 or (solved.status == 0 and solved.fun > 1e-6)


def _extreme(step: NDArray[np.int64], sign: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which counts of every expert are the first or last of those that enter at the same step: a fractional choice of
    the two makes any between them."""
    change = (step[:, 1:] != step[:, :-1]) | (sign[:, 1:] != sign[:, :-1])
    edge = np.ones((len(step), 1), dtype=bool)
    return np.hstack((edge, change)) | np.hstack((change, edge))
