"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_blocks(loads: Tensor, labels: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """The next `num_packs` heaviest items at a time, the heaviest to the lightest pack.

    Items are taken by (load descending, label ascending, index), so the items of a label follow each other. Those that
    reach over the edge of a block go to the first packs, by (load, number), that did not get their label in the block
    before; every other item of the block takes the first pack left. So no pack gets a label twice, unless a label has
    more items than there are packs.

    Args:
        loads: [rows, n] int32, fixed point; items of one label have the same load.
        labels: [rows, n] int64, expert of each item.
        num_packs: packs a row.

    Returns:
        pack, slot: [rows, n] int64; the items of block k are in slot k.

    Ties: the lower label, then the lower item; the lower pack.
    """
    by_label = labels.argsort(dim=1, stable=True)
    order = by_label.gather(1, loads.gather(1, by_label).argsort(dim=1, descending=True, stable=True))
    sorted_loads, sorted_labels = loads.gather(1, order), labels.gather(1, order)
    placed = torch.empty_like(order)
    pack_load = torch.zeros_like(loads[:, :num_packs])
    before = torch.full_like(sorted_labels[:, :num_packs], -1)  # label that each pack got in the block before
    for start in range(0, loads.shape[1], num_packs):
        block = slice(start, start + num_packs)
        packs = pack_load.argsort(dim=1, stable=True)
        if start:
            packs = _yield_turns(packs, before, sorted_labels[:, block], sorted_labels[:, start - 1 : start])
        placed[:, block] = packs
        pack_load.scatter_add_(1, packs, sorted_loads[:, block])
        before.scatter_(1, packs, sorted_labels[:, block])
    slot = (torch.arange(loads.shape[1]) // num_packs).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, placed), torch.empty_like(order).scatter_(1, order, slot)


def _yield_turns(packs: Tensor, before: Tensor, labels: Tensor, last: Tensor) -> Tensor:
    """Packs [rows, d] in the order that the block's items take them: where its first items continue the `last` label
    of the block before, packs without it come first, as many as there are such items."""
    continuing = (labels == last).sum(1, keepdim=True)
    free = before.gather(1, packs) != last
    first = free & (free.cumsum(1) <= continuing)
    return packs.gather(1, (~first).to(torch.uint8).argsort(dim=1, stable=True))
