"""Sections "Pipeline", "groups", "groups_partition" and "maps"."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from eplb_triton.policy import Corner, Exchange, Fixup, Nearest, Paired, Peak, Policy
from tests.stages.fourth import counts, packing
from tests.stages.fourth.arith import Floats, Ints, divide, fixed_point, total
from tests.stages.fourth.exchange import match_rounds, refine_exchange


def plan_layers(
    loads: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, policy: Policy
) -> tuple[Ints, Ints, Ints]:
    """`phy2log` [L, P], `phyrank` [L, P] and `logcnt` [L, E] of loads [L, E] that are not refused."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = loads.shape
    p, d = num_replicas // num_nodes, num_gpus // num_nodes
    rows: list[tuple[list[int], int, int]] = []  # experts, load of the layer's heaviest node, scale of the groups
    for layer_loads in loads:
        nodes, heaviest, group_scale = groups_to_nodes(layer_loads, num_groups, num_nodes, policy)
        size = num_experts // num_groups
        for groups in nodes:
            rows.append(([g * size + k for g in groups for k in range(size)], heaviest, group_scale))
    weights = [loads[row // num_nodes][experts] for row, (experts, _, _) in enumerate(rows)]
    redundant = p - num_experts // num_nodes
    tail = 0
    if rows and redundant and policy.counts not in ("capped", "waterfill"):
        tail = counts.tail_length(weights, redundant, policy.counts)
    phy2log, phyrank = (np.empty((num_layers, num_replicas), np.int64) for _ in range(2))
    logcnt = np.zeros((num_layers, num_experts), np.int64)
    for row, (experts, heaviest, group_scale) in enumerate(rows):
        c, replicas = counts_of_row(weights[row], p, d, tail, policy)
        target = (heaviest, group_scale) if num_nodes > 1 else None
        packs = to_gpus(weights[row], c, replicas, d, policy, target)
        layer, node = divmod(row, num_nodes)
        logcnt[layer, experts] = c
        for k, item in enumerate(itertools.chain.from_iterable(packs)):
            expert, rank = replicas[item]
            phy2log[layer, node * p + k], phyrank[layer, node * p + k] = experts[expert], rank
    return phy2log, phyrank, logcnt


def groups_to_nodes(layer: Floats, num_groups: int, num_nodes: int, policy: Policy) -> tuple[packing.Packs, int, int]:
    """The groups of each node; the heaviest node and the scale in fixed point."""
    loads = np.array([total(group) for group in layer.reshape(num_groups, -1)]).astype(np.float32)
    fixed, scale = fixed_point(loads, num_groups // num_nodes)
    if policy.group_pack == "partition":
        packs = partition(loads, fixed, num_nodes)
    else:
        packs = packing.pack_plain(loads, num_nodes)
    match policy.group_refine:
        case Nearest(steps, lights):
            packing.refine_nearest(loads, packs, steps, lights)
        case Corner(steps):
            packing.refine_corner(loads, packs, steps)
    return packs, max(sum(fixed[g] for g in node) for node in packs), scale


def partition(loads: Floats, fixed: list[int], num_nodes: int) -> packing.Packs:
    num_groups = len(fixed)
    size = num_groups // num_nodes
    number = math.factorial(num_groups) // (math.factorial(size) ** num_nodes * math.factorial(num_nodes))
    if number <= 1000:
        return min(
            partitions(list(range(num_groups)), size), key=lambda sets: max(sum(fixed[g] for g in s) for s in sets)
        )
    packs = packing.pack_plain(loads, num_nodes)
    match_rounds(fixed, list(range(num_groups)), packs, 0, 4 * num_groups, 1)
    return packs


def partitions(groups: list[int], size: int) -> Iterator[packing.Packs]:
    """All of them in lexicographic order."""
    if not groups:
        yield []
        return
    for others in itertools.combinations(groups[1:], size - 1):
        for rest in partitions([g for g in groups[1:] if g not in others], size):
            yield [[groups[0], *others], *rest]


def counts_of_row(w: Floats, p: int, d: int, tail: int, policy: Policy) -> tuple[Ints, counts.Replicas]:
    redundant = p - len(w)
    fix = policy.fixup
    if policy.counts == "capped":
        c = counts.capped(w, redundant, d)
        if isinstance(fix, Paired) and p == 2 * d:
            counts.fix_up_paired(w, c, d, fix)
        return c, counts.list_by_expert(c)
    replicas: counts.Replicas = []
    if policy.counts == "waterfill":
        c = counts.waterfill(w, p)
    else:
        c, replicas = counts.replicate(w, redundant, tail, policy.counts)
    if isinstance(fix, Fixup) and redundant and len(w) >= 2:
        counts.fix_up(w, c, replicas, fix)
    return c, replicas or counts.list_by_expert(c)


def to_gpus(
    w: Floats, c: Ints, replicas: counts.Replicas, d: int, policy: Policy, node: tuple[int, int] | None
) -> packing.Packs:
    labels = [expert for expert, _ in replicas]
    loads = divide(w, c)[labels]
    redundant = len(replicas) > len(w)
    if policy.gpu_pack == "blocks":
        fixed, scale = fixed_point(loads, len(replicas) // d)
        packs = packing.pack_blocks(fixed, labels, d)
        if isinstance(policy.gpu_refine, Exchange):
            target = -(-sum(fixed) // d)
            if node is not None:
                target = max(target, math.trunc(min(math.ldexp(float(node[0]), scale - node[1]) / d, 2.0**28)))
            refine_exchange(fixed, labels, packs, target, policy.gpu_refine)
        return packs
    packs = (
        packing.pack_spread(loads, labels, d)
        if policy.gpu_pack == "spread" and redundant
        else packing.pack_plain(loads, d)
    )
    match policy.gpu_refine:
        case Nearest(steps, lights):
            packing.refine_nearest(loads, packs, steps, lights)
        case Corner(steps):
            packing.refine_corner(loads, packs, steps, at_gpus=True)
        case Peak():
            packing.refine_peak(loads, labels, packs)
    return packs
