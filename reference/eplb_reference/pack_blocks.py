"""Blocks: replicas onto GPUs, one slot of all GPUs at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import indices


def fill_blocks(loads: Tensor, labels: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
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
    rows, num_items = loads.shape
    index = indices(num_items)
    # One integer to sort by: loads have 28 bits, so that 180,000 items fit.
    order = ((labels - loads.to(torch.int64) * num_items) * num_items + index).argsort(dim=1)
    sorted_loads = loads.gather(1, order).to(torch.int64) * num_packs
    ends, starts = _runs_over_edges(labels.gather(1, order).view(rows, -1, num_packs))
    packs = indices(num_packs).expand(rows, -1)  # load so far * m + number: one integer to sort by
    placed = torch.empty_like(order)
    for start in range(0, num_items, num_packs):
        packs, got = packs.sort(dim=1)  # got: which item of the block before each of them took
        edge = start // num_packs - 1
        if start and bool(starts[edge].any()):
            packs = _yield_turns(packs, got, ends[edge], starts[edge])
        block = slice(start, start + num_packs)
        placed[:, block] = packs
        packs = packs + sorted_loads[:, block]
    slot = (index // num_packs).expand_as(order)
    pack = torch.empty_like(order).scatter_(1, order, placed % num_packs)
    return pack, torch.empty_like(order).scatter_(1, order, slot)


def _runs_over_edges(labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each edge between the blocks of sorted `labels` [rows, S, d], what the label before it has on both sides.

    Returns:
        ends: [S - 1, rows, 1], first item of it in the block before.
        starts: [S - 1, rows, 1], how many items continue it in the block after.
    """
    last = labels[:, :-1, -1:]
    starts = (labels[:, 1:] == last).sum(2)
    ends = (labels[:, :-1] != last).sum(2)
    return ends.T.unsqueeze(2), starts.T.unsqueeze(2)


def _yield_turns(packs: Tensor, got: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """`packs` [rows, d] in the order that the block's items take them: where its first `start` items continue the last
    label of the block before, as many packs without it come first. Those that `got` the items from `end` have it."""
    free = got < end
    first = free & (free.cumsum(1) <= start)
    return packs.gather(1, (~first).to(torch.uint8).argsort(dim=1, stable=True))
