"""Fixed point: loads as int32 on a scale of their row, so that sums are exact in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.constants import LOAD_BITS, PENALTY


def fixed_point(loads: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Loads times a power of two, cut to an integer, so that `capacity` of them add up to less than 2**28.

    Args:
        loads: [rows, n] float32, at least 0.
        capacity: items in a pack.

    Returns:
        fixed: [rows, n] int32, trunc(load * 2**scale).
        scale: [rows, 1] int64: with 2**x <= largest load < 2**(x + 1), 27 - ceil(log2(capacity)) - x; 0 where all
            loads are 0.
    """
    largest = loads.amax(1, keepdim=True)
    exponent = largest.to(torch.float64).frexp().exponent.to(torch.int64)  # x + 1
    scale = LOAD_BITS - (capacity - 1).bit_length() - exponent
    scale.masked_fill_(largest == 0, 0)
    return (loads * power_of_two(scale)).to(torch.int32), scale


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exact from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def mean_target(fixed: Tensor, num_packs: int) -> Tensor:
    """[rows, 1] int32: the mean pack load, rounded up. No pack need be lighter."""
    total = fixed.sum(1, keepdim=True)  # int64
    return ((total + (num_packs - 1)) // num_packs).to(torch.int32)


def node_target(node_loads: Tensor, node_scale: Tensor, fixed: Tensor, scale: Tensor, num_packs: int) -> Tensor:
    """[rows, 1] int32: the mean GPU load of the layer's heaviest node on the scale of each row, or the row's own.

    Args:
        node_loads: [layers, nodes] int32, in the fixed point of the groups.
        node_scale: [layers, 1] int64.
        fixed: [layers * nodes, p] int32, replica loads.
        scale: [layers * nodes, 1] int64.
        num_packs: GPUs of a node.
    """
    num_nodes = node_loads.shape[1]
    heaviest = node_loads.amax(1, keepdim=True).to(torch.float64)
    shift = scale.view(-1, num_nodes) - node_scale
    of_layer = (heaviest * power_of_two(shift) / num_packs).clamp(max=PENALTY).to(torch.int32)
    return torch.maximum(of_layer.view(-1, 1), mean_target(fixed, num_packs))
