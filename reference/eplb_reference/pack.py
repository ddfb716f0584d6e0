"""Pack: items onto packs of equal capacity, heaviest first, each to the lightest pack with room.

Groups are packed onto nodes and replicas onto GPUs by the same functions. An item's index is its place in `loads`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.arith import indices, ordered_mean
from eplb_triton.constants import NEAR


def pack_plain(loads: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Longest processing time first, with a limit on the number of items in a pack.

    Args:
        loads: [rows, n] float32, load of each item; n is a multiple of `num_packs`.
        num_packs: packs a row; each takes n / num_packs items. Where that is 1, item i is put on pack i.

    Returns:
        pack, slot: [rows, n] int64, pack of each item and its place there, in placing order.

    Ties: the lower item first, the lower pack.
    """
    rows, num_items = loads.shape
    capacity = num_items // num_packs
    if capacity == 1:
        return _one_each(loads)
    order, sorted_loads = _heaviest_first(loads)
    pack_load = torch.zeros(rows, num_packs, dtype=torch.float32, device="cpu")
    filled = torch.zeros(rows, num_packs, dtype=torch.int64, device="cpu")
    placed = torch.empty_like(order)
    for item in range(num_items):
        lightest = pack_load.argmin(1, keepdim=True)
        placed[:, item] = lightest.squeeze(1)
        held = filled.gather(1, lightest) + 1
        filled.scatter_(1, lightest, held)
        load = pack_load.gather(1, lightest) + sorted_loads[:, item : item + 1]
        pack_load.scatter_(1, lightest, load.masked_fill_(held == capacity, torch.inf))  # a full pack never wins
    return _positions(order, placed, num_packs)


def pack_spread(loads: Tensor, labels: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """As `pack_plain`, but among packs of nearly equal load prefers one with fewer replicas of the item's expert,
    then fewer items.

    Packs with room are scanned in index order. One replaces the choice so far if it is lighter by more than 1e-6 of
    the mean item load, or within that and smaller in (replicas of the expert, items): the choice may drift.

    Args:
        loads: [rows, n] float32.
        labels: [rows, n] int64, expert of each item.
        num_packs: packs a row.

    Returns:
        pack, slot: [rows, n] int64.
    """
    rows, num_items = loads.shape
    capacity = num_items // num_packs
    if capacity == 1:
        return _one_each(loads)
    order, sorted_loads = _heaviest_first(loads)
    sorted_labels = labels.gather(1, order)
    near = (NEAR * ordered_mean(loads)).to(torch.float32).unsqueeze(1)
    pack_load = torch.zeros(rows, num_packs, dtype=torch.float32, device="cpu")
    filled = torch.zeros(rows, num_packs, dtype=torch.int64, device="cpu")
    placed = torch.empty_like(order)
    for item in range(num_items):
        same = (sorted_labels[:, :item] == sorted_labels[:, item : item + 1]).to(torch.int64)
        replicas = torch.zeros_like(filled).scatter_add_(1, placed[:, :item], same)
        # (replicas, items) in one integer: items stay below the capacity while a pack has room.
        crowding = replicas * capacity + filled
        chosen = _scan(pack_load, crowding, filled < capacity, near)
        placed[:, item] = chosen.squeeze(1)
        filled.scatter_add_(1, chosen, torch.ones_like(chosen))
        pack_load.scatter_add_(1, chosen, sorted_loads[:, item : item + 1])
    return _positions(order, placed, num_packs)


def _scan(pack_load: Tensor, crowding: Tensor, has_room: Tensor, near: Tensor) -> Tensor:
    """[rows, 1]: where a scan of the packs in index order ends. Each round jumps to the next pack that replaces the
    choice, which is what scanning pack by pack does."""
    index = indices(pack_load.shape[1])
    choice = has_room.to(torch.uint8).argmax(1, keepdim=True)
    while True:
        choice_load = pack_load.gather(1, choice)
        lighter = pack_load + near < choice_load
        level = (pack_load - choice_load).abs() <= near
        emptier = crowding < crowding.gather(1, choice)
        replaces = has_room & (index > choice) & (lighter | (level & emptier))
        if not bool(replaces.any()):
            return choice
        following = replaces.to(torch.uint8).argmax(1, keepdim=True)
        choice = torch.where(replaces.any(1, keepdim=True), following, choice)


def _one_each(loads: Tensor) -> tuple[Tensor, Tensor]:
    pack = indices(loads.shape[1]).repeat(loads.shape[0], 1)
    return pack, torch.zeros_like(pack)


def _heaviest_first(loads: Tensor) -> tuple[Tensor, Tensor]:
    """Items in descending order of load, ties: lower item; and their loads in that order."""
    order = loads.argsort(dim=1, descending=True, stable=True)
    return order, loads.gather(1, order)


def _positions(order: Tensor, placed: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """(pack, slot) of each item, from the items in placing order and the pack each was `placed` on."""
    capacity = order.shape[1] // num_packs
    by_pack = placed.argsort(dim=1, stable=True)  # every pack holds `capacity` items, in placing order
    slots = (indices(order.shape[1]) % capacity).expand_as(order)
    slot_placed = torch.empty_like(order).scatter_(1, by_pack, slots)
    return torch.empty_like(order).scatter_(1, order, placed), torch.empty_like(order).scatter_(1, order, slot_placed)
