"""The stages of a plan in their order: groups to nodes, replicate, fix up, replicas to GPUs, maps."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference import (
    fixup,
    fixup_paired,
    groups,
    groups_partition,
    maps,
    pack,
    pack_blocks,
    refine,
    replicate,
    replicate_capped,
    replicate_waterfill,
)
from eplb_reference.arith import indices, per_replica
from eplb_reference.fixed import fixed_point, mean_target, node_target
from eplb_reference.refine_exchange import refine_doubles, refine_match, refine_pairs
from eplb_triton.policy import Corner, Counts, Exchange, Fixup, Nearest, Paired, Peak, Policy
from eplb_triton.topology import Topology

_PICKS = {
    "dispersion": replicate.pick_sainte_lague,
    "simulated": replicate.pick_sainte_lague,
    "peak_aware": replicate.pick_peak_aware,
    "gated": replicate.pick_gated,
}


def plan_layers(loads: Tensor, topology: Topology, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Plan every layer of `loads`, all rows of the call at once.

    Args:
        loads: [L, E] float32 on the CPU: finite, at least 0, no -0, E as `topology.check_experts` allows.
        topology: counts of the cluster.
        policy: the choice at each stage.

    Returns:
        phy2log [L, P], phyrank [L, P], logcnt [L, E], int64: expert in each physical slot, which of the expert's
        replicas it is, and how many there are.
    """
    num_layers, num_experts = loads.shape
    if num_layers == 0:
        empty = torch.empty(0, topology.num_replicas, dtype=torch.int64, device="cpu")
        return empty, empty.clone(), torch.empty(0, num_experts, dtype=torch.int64, device="cpu")
    experts = _experts_of_rows(loads, topology, policy)  # [L * N, e]
    row_loads = loads.gather(1, experts.view(num_layers, num_experts)).view_as(experts)
    counts, expert, rank = _replicate(row_loads, topology, policy)
    replica_loads = per_replica(row_loads, counts).gather(1, expert)
    if policy.gpu_pack == "blocks":
        gpu, slot = _to_gpus_fixed(row_loads, replica_loads, expert, topology, policy)
    else:
        gpu, slot = _to_gpus(replica_loads, expert, topology, policy, redundant=expert.shape[1] > row_loads.shape[1])
    return maps.physical_maps(gpu, slot, experts.gather(1, expert), rank, num_experts, topology)


def _experts_of_rows(loads: Tensor, topology: Topology, policy: Policy) -> Tensor:
    """Experts [L * N, e] of each row: pack the groups of a layer onto its nodes, then refine."""
    num_groups, num_nodes = topology.planned_groups, topology.planned_nodes
    of_groups = groups.group_loads(loads, num_groups)
    if policy.group_pack == "partition":
        node, position = groups_partition.pack_partition(of_groups, num_nodes)
    else:
        node, position = pack.pack_plain(of_groups, num_nodes)
    choice = policy.group_refine
    if isinstance(choice, Nearest):
        node, position = refine.refine_nearest(of_groups, node, position, num_nodes, choice.steps, choice.lights)
    elif isinstance(choice, Corner):
        node, position = refine.refine_corner(of_groups, node, position, num_nodes, choice.steps)
    return groups.list_experts(node, position, loads.shape[1] // num_groups, num_nodes)


def _replicate(loads: Tensor, topology: Topology, policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [rows, e] and replica list (expert, rank) [rows, p] of every row, fixed up."""
    num_experts, num_replicas = loads.shape[1], topology.replicas_per_node
    if policy.counts == "capped":
        counts = replicate_capped.capped_counts(loads, num_replicas, topology.gpus_per_node)
        if isinstance(policy.fixup, Paired) and topology.slots_per_gpu == 2:
            fixup_paired.move_paired(loads, counts, topology.gpus_per_node, policy.fixup.moves, policy.fixup.donors)
        return counts, *replicate_waterfill.list_by_expert(counts)
    fix = policy.fixup if isinstance(policy.fixup, Fixup) and num_replicas > num_experts > 1 else None
    if policy.counts == "waterfill":
        counts = replicate_waterfill.waterfill_counts(loads, num_replicas)
        if fix:
            fixup.move_replicas(loads, counts, None, None, fix.moves, fix.donors, fix.peak, fix.tie)
        return counts, *replicate_waterfill.list_by_expert(counts)
    counts = torch.ones(loads.shape, dtype=torch.int64, device="cpu")
    expert = torch.empty(loads.shape[0], num_replicas, dtype=torch.int64, device="cpu")
    rank = torch.zeros_like(expert)
    expert[:, :num_experts] = indices(num_experts)
    if num_replicas > num_experts:
        bulk = num_replicas - _tail_length(loads, num_replicas - num_experts, policy.counts)
        replicate.pick_dhondt(loads, counts, expert, rank, num_experts, bulk)
        if policy.counts != "dhondt":
            _PICKS[policy.counts](loads, counts, expert, rank, bulk, num_replicas)
    if fix:
        fixup.move_replicas(loads, counts, expert, rank, fix.moves, fix.donors, fix.peak, fix.tie)
    return counts, expert, rank


def _tail_length(loads: Tensor, num_redundant: int, rule: Counts) -> int:
    """How many of the redundant replicas the tail rule picks; the rest goes by D'Hondt."""
    if rule == "dhondt":
        return 0
    if rule == "dispersion":
        return replicate.dispersion_tail(loads, num_redundant)
    if rule == "simulated":
        return replicate.simulated_tail(loads, num_redundant)
    return replicate.fixed_tail(num_redundant)


def _to_gpus(
    replica_loads: Tensor, labels: Tensor, topology: Topology, policy: Policy, *, redundant: bool
) -> tuple[Tensor, Tensor]:
    """(GPU on its node, slot) [rows, p] of every replica: pack, then refine.

    Where no expert has two replicas there is nothing to spread.
    """
    num_gpus = topology.gpus_per_node
    if policy.gpu_pack == "spread" and redundant and num_gpus > 1:
        gpu, slot = pack.pack_spread(replica_loads, labels, num_gpus)
    else:
        gpu, slot = pack.pack_plain(replica_loads, num_gpus)
    choice = policy.gpu_refine
    if isinstance(choice, Nearest):
        return refine.refine_nearest(replica_loads, gpu, slot, num_gpus, choice.steps, choice.lights)
    if isinstance(choice, Corner):
        steps = refine.corner_gpu_steps(replica_loads, gpu, slot, num_gpus, choice.steps)
        return refine.refine_corner(replica_loads, gpu, slot, num_gpus, steps)
    if isinstance(choice, Peak):
        return refine.refine_peak(replica_loads, labels, gpu, slot, num_gpus)
    return gpu, slot


def _to_gpus_fixed(
    loads: Tensor, replica_loads: Tensor, labels: Tensor, topology: Topology, policy: Policy
) -> tuple[Tensor, Tensor]:
    """(GPU on its node, slot) [rows, p] of every replica, in fixed point: blocks, then exchanges.

    The node that the groups made heaviest sets the target of the others.
    """
    num_gpus = topology.gpus_per_node
    fixed, scale = fixed_point(replica_loads, topology.slots_per_gpu)
    gpu, slot = pack_blocks.fill_blocks(fixed, labels, num_gpus)
    choice = policy.gpu_refine
    if not isinstance(choice, Exchange):
        return gpu, slot
    target = _target(loads, fixed, scale, topology)
    gpu, slot = refine_pairs(fixed, labels, gpu, slot, num_gpus, target, choice.pair_rounds)
    gpu, slot = refine_match(fixed, labels, gpu, slot, num_gpus, target, choice.match_rounds, choice.proposers)
    return refine_doubles(fixed, labels, gpu, slot, num_gpus, target, choice.double_steps, choice.candidates)


def _target(loads: Tensor, fixed: Tensor, scale: Tensor, topology: Topology) -> Tensor:
    """[rows, 1] int32: the GPU load below which a row has nothing to gain."""
    num_groups, num_nodes = topology.planned_groups, topology.planned_nodes
    if num_nodes == 1:
        return mean_target(fixed, topology.gpus_per_node)
    nodes, group_scale = groups.node_loads(loads, num_groups, num_nodes)
    return node_target(nodes, group_scale, fixed, scale, topology.gpus_per_node)
