"""Partition: groups onto nodes so that the heaviest node is as light as it can be."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.exchange import refine_match
from eplb_reference.fixed import fixed_point
from eplb_reference.pack import pack_plain
from eplb_triton.partitions import MOST_PARTITIONS, all_partitions, num_partitions

EXCHANGES_PER_ITEM = 4  # of the rounds that follow a packing that is not the best


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
    if num_partitions(num_items, num_packs) > MOST_PARTITIONS:
        pack, slot = pack_plain(loads, num_packs)
        fixed, _ = fixed_point(loads, num_items // num_packs)
        labels = torch.arange(num_items).expand_as(pack)
        target = torch.zeros(loads.shape[0], 1, dtype=torch.int32)
        return refine_match(fixed, labels, pack, slot, num_packs, target, EXCHANGES_PER_ITEM * num_items, 1)
    fixed, _ = fixed_point(loads, num_items // num_packs)
    table = torch.tensor(all_partitions(num_items, num_packs))  # [partitions, packs, capacity]
    heaviest = fixed[:, table].sum(3).amax(2)  # [rows, partitions]
    order = table[heaviest.argmin(1)].flatten(1)  # [rows, n], items in place order
    place = torch.empty_like(order).scatter_(1, order, torch.arange(num_items).expand_as(order))
    capacity = num_items // num_packs
    return place // capacity, place % capacity
