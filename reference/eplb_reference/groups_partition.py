"""Partition: groups onto nodes so that the heaviest node is as light as it can be."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from eplb_reference.arith import indices
from eplb_reference.fixed import fixed_point
from eplb_reference.pack import pack_plain
from eplb_reference.refine_exchange import refine_match
from eplb_triton.constants import EXCHANGES_PER_ITEM
from eplb_triton.partitions import partitions_to_try


def pack_partition(loads: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """The partition of the items into equal packs whose heaviest pack is lightest, in fixed point.

    All partitions are tried where there are at most 1,000; else `pack_plain`, then the best exchange with the heaviest
    pack, until none gains (at most 4 per item).

    Args:
        loads: [rows, n] float32, load of each item; n is a multiple of `num_packs`.
        num_packs: packs a row.

    Returns:
        pack, slot: [rows, n] int64. Of an exhaustive search: packs in the order of their lowest item, items in index
        order.

    Ties: the partition first in `partitions`.
    """
    num_items = loads.shape[1]
    if not partitions_to_try(num_items, num_packs):
        pack, slot = pack_plain(loads, num_packs)
        fixed, _ = fixed_point(loads, num_items // num_packs)
        labels = indices(num_items).expand_as(pack)
        target = torch.zeros(loads.shape[0], 1, dtype=torch.int32, device="cpu")
        return refine_match(fixed, labels, pack, slot, num_packs, target, EXCHANGES_PER_ITEM * num_items, 1)
    capacity = num_items // num_packs
    fixed, _ = fixed_point(loads, capacity)
    table = _table(num_items, num_packs)  # [capacity, packs, partitions]
    pack_loads = fixed.index_select(1, table.flatten()).view(-1, *table.shape).sum(1, dtype=torch.int32)
    order = table[..., pack_loads.amax(1).argmin(1)]  # [capacity, packs, rows], items in place order
    order = order.permute(2, 1, 0).flatten(1).contiguous()
    place = torch.empty_like(order).scatter_(1, order, indices(num_items).expand_as(order))
    return place // capacity, place % capacity


@cache
def _table(num_items: int, num_packs: int) -> Tensor:
    """All partitions [capacity, packs, partitions]: the dimension that operations should run along comes last."""
    table = torch.tensor(partitions_to_try(num_items, num_packs), dtype=torch.int64, device="cpu")
    return table.permute(2, 1, 0).contiguous()
