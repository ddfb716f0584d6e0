"""Static dispatch: one slot for each expert, as seen from one GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.serving.checks import check_placement, gpus_of_node
from eplb_triton.topology import Topology

_MOST_ELEMENTS = 1 << 22  # of a temporary tensor: layers are taken so many at a time


def dispatch_map(rank: int, phy2log: Tensor, num_experts: int, topology: Topology) -> Tensor:
    """The slot that one rank sends each expert's tokens to, where a framework's dispatch is static.

    Its own replica, the lowest slot; else one on its node; else any. Of the ranks that have to share, in ascending
    order, the i-th takes place i mod c of the c places in question, in slot order: of the node, or of all.

    Args:
        rank: which GPU, 0 to D - 1.
        phy2log: [L, P] int64 or int32, expert in each slot, -1 where there is none.
        num_experts: E.
        topology: P, D, and N nodes of D / N GPUs; where N does not divide D, one node.

    Returns:
        [L, E], of the type and on the device of phy2log; -1 for an expert without a place.

    Raises:
        ValueError: `rank` is no GPU, or phy2log is no map of the topology.
    """
    check_placement(phy2log, topology)
    gpus = topology.num_gpus
    if not 0 <= rank < gpus:
        raise ValueError(f"rank={rank} must be 0 to {gpus - 1}, as there are {gpus} GPUs")
    size = gpus_of_node(topology)
    at_once = max(1, _MOST_ELEMENTS // (gpus * num_experts))
    parts = [_of_rank(rank, slots, num_experts, gpus, size) for slots in torch.split(phy2log, at_once)]
    return torch.cat(parts).to(phy2log.dtype) if parts else phy2log.new_empty(0, num_experts)


def _of_rank(rank: int, phy2log: Tensor, num_experts: int, gpus: int, size: int) -> Tensor:
    """[L, E] int64, for nodes of `size` GPUs."""
    layers, replicas = phy2log.shape
    slot = torch.arange(replicas, device=phy2log.device).expand(layers, -1)
    key = (
        slot // (replicas // gpus) * (num_experts + 1) + phy2log.long() + 1
    )  # GPU and expert, -1 in a column of its own
    lowest = torch.full((layers, gpus * (num_experts + 1)), replicas, device=phy2log.device)
    lowest.scatter_reduce_(1, key, slot, "amin")
    lowest = lowest.view(layers, gpus, num_experts + 1)[:, :, 1:]  # [L, D, E]
    holds = lowest < replicas
    node = slice(rank // size * size, rank // size * size + size)
    on_node = holds.view(layers, gpus // size, size, num_experts).any(2)  # [L, N, E]
    near = _nth_place(lowest[:, node], holds[:, node], (~holds[:, node.start : rank]).sum(1))
    far = _nth_place(lowest, holds, (~on_node).repeat_interleave(size, 1)[:, :rank].sum(1))
    shared = torch.where(on_node[:, rank // size], near, far)
    return torch.where(holds[:, rank], lowest[:, rank], shared)


def _nth_place(lowest: Tensor, holds: Tensor, nth: Tensor) -> Tensor:
    """[L, E]: the slot of place `nth` mod their number among GPUs [L, d, E]; -1 where there is none."""
    upto = holds.cumsum(1)
    wanted = nth % upto[:, -1].clamp(min=1) + 1
    gpu = (holds & (upto == wanted.unsqueeze(1))).to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(upto[:, -1] > 0, lowest.gather(1, gpu).squeeze(1), -1)
