"""Slots of every expert from the expert of every slot, as vLLM's dispatch reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TABLE_WIDTH = 16
"""Entries of an expert in a table that repeats slots by weight: shares in sixteenths."""


def maps_of_slots(physical_to_logical_map: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """Slots and numbers of replicas of every expert.

    Args:
        physical_to_logical_map: [L, P] or [P] int64 or int32 on the CPU, expert of each slot; negative: none.
        num_logical_experts: E.

    Returns:
        [L, E, most replicas of one] slots, ascending, -1 behind them, and [L, E] replicas; of one layer without L; of
        the type of the argument.

    Raises:
        ValueError: on another device, of another type or number of dimensions, or a slot names an expert above E - 1.
    """
    given = physical_to_logical_map
    if given.device.type != "cpu" or given.dtype not in (torch.int64, torch.int32) or given.dim() not in (1, 2):
        raise ValueError(
            f"physical_to_logical_map is {given.dtype} {tuple(given.shape)} on {given.device}, must be int64 or int32, "
            "[layers, slots] or [slots], on the CPU"
        )
    slots = np.atleast_2d(given.detach().numpy())
    layers, width = slots.shape
    experts = num_logical_experts + 1  # one more, for slots without any; cut off again
    if slots.size and slots.max() >= num_logical_experts:
        raise ValueError(f"physical_to_logical_map names expert {slots.max()}, must be below {num_logical_experts}")
    label = np.where(slots < 0, num_logical_experts, slots) + np.arange(layers)[:, None] * experts
    order = label.ravel().argsort(kind="stable")  # by layer, then expert, then slot
    label = label.ravel()[order]
    count = np.bincount(label, minlength=layers * experts)
    rank = np.arange(label.size) - (np.cumsum(count) - count)[label]
    counts = count.reshape(layers, experts)[:, :num_logical_experts]
    most = int(counts.max())
    held = label % experts < num_logical_experts
    table = np.full((layers * experts, most), -1, slots.dtype)
    table[label[held], rank[held]] = order[held] % width
    table = table.reshape(layers, experts, most)[:, :num_logical_experts]
    maps = torch.from_numpy(np.ascontiguousarray(table)), torch.from_numpy(counts.astype(slots.dtype))
    return maps if given.dim() == 2 else (maps[0][0], maps[1][0])
