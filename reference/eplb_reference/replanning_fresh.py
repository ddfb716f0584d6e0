"""Replanning: a plan from the samples alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eplb_reference import groups_partition
from eplb_reference.arith import per_replica, square_root
from eplb_reference.fixed import fixed_point
from eplb_reference.pack_blocks import fill_blocks
from eplb_reference.replanning_potential import Judge
from eplb_reference.replicate_capped import capped_counts
from eplb_reference.replicate_waterfill import list_by_expert
from eplb_triton.topology import Topology


def fresh_plan(judge: Judge, topology: Topology, previous: Tensor | None) -> Tensor:
    """phy2log [L, P] int64: counts, then blocks, of each expert's mean load and a part of its deviation.

    Args:
        judge: the samples, and how many deviations count.
        topology: counts of the cluster.
        previous: [L, P] int64, each node keeps the experts that it holds there; None: groups are packed onto nodes as
            `partition` does.
    """
    num_layers, num_experts, _ = judge.samples.shape
    num_nodes, p, d = topology.planned_nodes, topology.replicas_per_node, topology.gpus_per_node
    total = judge.samples.sum(2)
    if previous is None:
        experts = _experts_by_partition(total, topology)
    else:
        experts = _experts_held(previous, num_experts, num_nodes)
    weights = _weights(judge, total, topology.slots_per_gpu).gather(1, experts.view(num_layers, -1)).view_as(experts)
    counts = capped_counts(weights, p, d)
    expert, _ = list_by_expert(counts)
    loads, _ = fixed_point(per_replica(weights, counts).gather(1, expert), topology.slots_per_gpu)
    gpu, slot = fill_blocks(loads, expert, d)
    place = gpu * topology.slots_per_gpu + slot
    return torch.empty_like(place).scatter_(1, place, experts.gather(1, expert)).view(num_layers, -1)


def _weights(judge: Judge, total: Tensor, slots_per_gpu: int) -> Tensor:
    """[L, E] float32: T times (mean + z / sqrt(S) deviations), at least 1: S replicas of independent loads deviate by
    sqrt(S) of them together."""
    twice = judge.num_samples.unsqueeze(1) * judge.samples.square().sum(2) - total.square()
    deviation = square_root(twice.clamp(min=0).to(torch.float64)) * (judge.z / math.sqrt(slots_per_gpu))
    return (total.to(torch.float64) + deviation).clamp(min=1).to(torch.float32)


def _experts_held(phy2log: Tensor, num_experts: int, num_nodes: int) -> Tensor:
    """[L * N, e] int64: the experts on each node, ascending; as many on each, and none on two."""
    rows = phy2log.reshape(len(phy2log) * num_nodes, -1)
    held = torch.zeros(len(rows), num_experts, dtype=torch.bool, device="cpu").scatter_(1, rows, True)
    return held.nonzero()[:, 1].view(len(rows), num_experts // num_nodes)


def _experts_by_partition(total: Tensor, topology: Topology) -> Tensor:
    """[L * N, e] int64: the experts on each node, ascending, of the best partition of the groups."""
    num_layers, num_experts = total.shape
    loads = total.view(num_layers, topology.planned_groups, -1).sum(2).to(torch.float32)
    node, _ = groups_partition.pack_partition(loads, topology.planned_nodes)
    node_of_expert = node.repeat_interleave(num_experts // topology.planned_groups, 1)
    return node_of_expert.argsort(dim=1, stable=True).view(num_layers * topology.planned_nodes, -1)
