"""Groups: their loads, and the experts and loads of the nodes that they are packed onto."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import indices, ordered_sum
from eplb_reference.fixed import fixed_point


def group_loads(loads: Tensor, num_groups: int) -> Tensor:
    """Loads [L, G] float32 of the groups of `loads` [L, E]: each group's experts summed in float64, rounded once."""
    return ordered_sum(loads.view(loads.shape[0], num_groups, -1)).to(torch.float32)


def list_experts(pack: Tensor, slot: Tensor, group_size: int, num_packs: int) -> Tensor:
    """Experts [L * N, e] of each node: its groups in position order, a group's experts in index order."""
    num_layers, num_groups = pack.shape
    place = pack * (num_groups // num_packs) + slot
    groups = torch.empty_like(place).scatter_(1, place, indices(num_groups).expand_as(place))
    return (groups.unsqueeze(2) * group_size + indices(group_size)).view(num_layers * num_packs, -1)


def node_loads(loads: Tensor, num_groups: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Load [L, N] of each node in the fixed point of its layer's groups, and the scale of that.

    Args:
        loads: [L * N, e] float32, loads of each node's experts as `list_experts` orders them.
    """
    size, group_size = num_groups // num_nodes, loads.shape[1] * num_nodes // num_groups
    of_groups = ordered_sum(loads.view(-1, num_groups, group_size)).to(torch.float32)
    fixed, scale = fixed_point(of_groups, size)
    return fixed.view(-1, num_nodes, size).sum(2), scale
