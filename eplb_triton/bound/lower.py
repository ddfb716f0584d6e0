"""The load below which no placement can bring the heaviest GPU of a layer: what a plan is measured against.

docs/bound.md has the proof of every part.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from eplb_triton.loads import as_loads
from eplb_triton.partitions import partitions_to_try
from eplb_triton.topology import Topology, check_topology


def lower_bound(weight: Tensor, topology: Topology, *, pairing: bool = True) -> Tensor:
    """A load that the heaviest GPU of each layer has in every placement, whatever planned it.

    The largest of: the mean GPU load; in hierarchical planning, of the best partition of the groups into nodes, the
    mean GPU load of its heaviest node (exact up to 1,000 partitions); the largest replica that any counts must leave
    (exact with one slot a GPU); with two slots a GPU, what the best pairing of any fractional counts leaves.

    Args:
        weight: [L, E], load of each logical expert, as `plan` takes them; nothing is rounded but integers above 2**53.
        topology: replicas, groups, nodes and GPUs.
        pairing: whether to solve the linear programs for two slots a GPU: about 0.6 s a layer of 256 experts.

    Returns:
        [L] float64 on the CPU.

    Raises:
        ImportError: two slots a GPU and SciPy is missing: `pip install eplb-triton[bound]`, or `pairing=False`.
        TypeError: `weight` is no tensor.
        ValueError: `weight` is not [layers, experts], not dense, not real, or holds a load that `plan` refuses; the
            topology does not fit it.
    """
    check_topology(topology)
    loads = as_loads(weight, dtype=torch.float64)
    topology.check_experts(loads.shape[1])
    if len(loads) == 0:
        return loads.new_empty(0)
    bound = torch.maximum(loads.sum(1) / topology.num_gpus, _largest_replica(loads, topology.num_replicas))
    if topology.planned_nodes > 1:
        bound = torch.maximum(bound, _node_bound(loads, topology))
    if topology.slots_per_gpu == 2 and pairing:
        bound = _pairing_bound(loads, bound, topology)
    return bound


def _pairing_bound(loads: Tensor, bound: Tensor, topology: Topology) -> Tensor:
    try:
        from eplb_triton.bound.pairing import pairing_bound  # noqa: PLC0415 - SciPy is an optional extra
    except ImportError as missing:
        raise ImportError(
            "lower_bound with two slots a GPU needs SciPy: pip install eplb-triton[bound], or pass pairing=False"
        ) from missing
    layers = zip(loads, bound.tolist(), strict=True)
    return torch.tensor(
        [pairing_bound(row.numpy(), topology, least) for row, least in layers], dtype=torch.float64, device="cpu"
    )


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
    partitions = partitions_to_try(num_groups, num_nodes)
    if not partitions:
        return _crowded_node(groups.sum(2), num_nodes) / gpus
    subsets = list(combinations(range(num_groups), size))
    experts = groups[:, torch.tensor(subsets, dtype=torch.int64, device="cpu")].flatten(2)  # [L, subsets, e]
    level = _largest_replica(experts.flatten(0, 1), topology.replicas_per_node).view(experts.shape[:2])
    of_subset = torch.maximum(experts.sum(2) / gpus, level)
    best = torch.full_like(loads[:, 0], torch.inf)
    for partition in partitions:
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
