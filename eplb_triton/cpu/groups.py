"""Groups: their loads, and the experts and loads of the nodes that they are packed onto."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Doubles, Floats, Ints, doubles, floats
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.fixed import fixed_point


@stage
def group_loads(loads: Floats, group_size: int, of_groups: Floats) -> None:
    """Sum each group's experts in float64, rounded once."""
    for group in range(of_groups.size):
        total = 0.0
        for expert in range(group * group_size, (group + 1) * group_size):
            total += np.float64(loads[expert])
        of_groups[group] = np.float32(total)


@stage
def list_experts(pack: Ints, slot: Ints, group_size: int, num_packs: int, experts: Ints) -> None:
    """The layer's experts node by node: a node's groups in position order, a group's experts in index order."""
    capacity = pack.size // num_packs
    for group in range(pack.size):
        first = (pack[group] * capacity + slot[group]) * group_size
        for nth in range(group_size):
            experts[first + nth] = group * group_size + nth


@stage
def node_loads(loads: Floats, experts: Ints, num_groups: int, node_loads: Doubles) -> int:
    """Fill the load of each node of a layer in the fixed point of its groups; the scale of that."""
    group_size, size = experts.size // num_groups, num_groups // node_loads.size
    groups, fixed = floats(num_groups), doubles(num_groups)
    placed = floats(experts.size)
    for k in range(experts.size):
        placed[k] = loads[experts[k]]
    group_loads(placed, group_size, groups)
    scale = fixed_point(groups, size, fixed)
    for node in range(node_loads.size):
        node_loads[node] = 0
        for group in range(node * size, (node + 1) * size):
            node_loads[node] += fixed[group]
    return scale
