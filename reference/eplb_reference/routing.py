"""Routing: which physical slot each token of a step goes to, by the quotas of its experts.

A *place* is as in splitting.py. Where the quotas of an expert are all 0, each place counts as having 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.places import list_places

WORD = 0xFFFFFFFF
ROW, LAYER, SALT = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


def exact_slots(topk_ids: Tensor, phy2log: Tensor, quotas: Tensor, offsets: Tensor, num_gpus: int) -> Tensor:
    """Slots by counting: over all ranks, every place gets exactly its quota.

    The g-th token of an expert, counted over ranks and in each in the order of its `topk_ids`, row by row, goes to
    the first place, in slot order, whose cumulative quota exceeds g; one beyond all quotas to the last of them.

    Args:
        topk_ids: [tokens, k] integers, logical experts, -1 for none.
        phy2log: [P] integers, of the layer.
        quotas: [P] int32, of these very counts.
        offsets: [E] int32, tokens of each expert on lower ranks.
        num_gpus: D.

    Returns:
        [tokens, k] int64, physical slots; -1 for an id of -1, and of an expert without a place.
    """
    ids = topk_ids.flatten().to(torch.int64)
    by_expert = ids.argsort(stable=True)
    grouped = ids[by_expert]
    nth = torch.empty_like(ids).scatter_(
        0, by_expert, torch.arange(len(ids), dtype=torch.int64, device="cpu") - torch.searchsorted(grouped, grouped)
    )
    return _look_up(ids, nth + offsets.to(torch.int64)[ids], phy2log, quotas, len(offsets), num_gpus).view_as(topk_ids)


def hashed_slots(
    topk_ids: Tensor, phy2log: Tensor, quotas: Tensor, num_experts: int, num_gpus: int, layer: int, salt: int
) -> Tensor:
    """Slots by a hash of (row of `topk_ids`, layer, salt), in proportion to the quotas: of one row, one hash.

    Args:
        topk_ids: [tokens, k] integers, logical experts, -1 for none.
        phy2log: [P] integers, of the layer.
        quotas: [P] int32, of these or earlier loads.
        num_experts: E.
        num_gpus: D.
        layer: its index.
        salt: any integer, of the rank and the step.

    Returns:
        [tokens, k] int64, as `exact_slots`.
    """
    ids = topk_ids.flatten().to(torch.int64)
    row = torch.arange(topk_ids.shape[0], dtype=torch.int64, device="cpu")
    x = (row * ROW & WORD) ^ (layer * LAYER & WORD) ^ (salt * SALT & WORD)
    x = (x ^ x >> 16) * FIRST & WORD
    x = (x ^ x >> 15) * SECOND & WORD
    x = (x ^ x >> 16).repeat_interleave(topk_ids.shape[1])
    total = _totals(phy2log, quotas, num_experts, num_gpus)
    return _look_up(ids, x * total[ids] >> 32, phy2log, quotas, num_experts, num_gpus).view_as(topk_ids)


def fill_table(phy2log: Tensor, quotas: Tensor, num_experts: int, num_gpus: int, width: int) -> Tensor:
    """A table of slots in which the places of each expert are repeated in proportion to their quotas.

    By largest remainder of quota * width / sum, ties lowest slot; in slot order.

    Args:
        phy2log: [L, P] integers.
        quotas: [L, P] int32.
        num_experts: E.
        num_gpus: D.
        width: M, entries of an expert.

    Returns:
        [L, E, M] int64, physical slots; -1 for an expert without a place.
    """
    table = torch.full((phy2log.shape[0], num_experts, width), -1, dtype=torch.int64, device="cpu")
    for layer, (slots, quota) in enumerate(zip(phy2log.tolist(), quotas.tolist(), strict=True)):
        for expert, places in enumerate(list_places(slots, num_experts, num_gpus)):
            if places:
                shares = [quota[slot] for slot in places]
                entries = _repeated(places, shares if any(shares) else [1] * len(shares), width)
                table[layer, expert] = torch.tensor(entries, dtype=torch.int64, device="cpu")
    return table


def _repeated(places: list[int], shares: list[int], width: int) -> list[int]:
    total = sum(shares)
    times = [share * width // total for share in shares]
    by_remainder = sorted(range(len(places)), key=lambda i: (-(shares[i] * width % total), i))
    for i in by_remainder[: width - sum(times)]:
        times[i] += 1
    return [slot for slot, number in zip(places, times, strict=True) for _ in range(number)]


def _cumulative(phy2log: Tensor, quotas: Tensor, num_experts: int, num_gpus: int) -> tuple[Tensor, Tensor]:
    """Slot and cumulative quota [E, most places] of the places of each expert; beyond them the last one again."""
    places = list_places(phy2log.tolist(), num_experts, num_gpus)
    most = max([1, *map(len, places)])
    slots = torch.tensor(
        [(own + own[-1:] * most)[:most] if own else [-1] * most for own in places], dtype=torch.int64, device="cpu"
    )
    quota = quotas.to(torch.int64)[slots.clamp(min=0)]
    quota[quota.sum(1) == 0] = 1
    there = torch.arange(most, dtype=torch.int64, device="cpu") < torch.tensor(
        [len(own) for own in places], dtype=torch.int64, device="cpu"
    ).unsqueeze(1)
    return slots, (quota * there).cumsum(1)


def _totals(phy2log: Tensor, quotas: Tensor, num_experts: int, num_gpus: int) -> Tensor:
    return _cumulative(phy2log, quotas, num_experts, num_gpus)[1][:, -1]


def _look_up(ids: Tensor, nth: Tensor, phy2log: Tensor, quotas: Tensor, num_experts: int, num_gpus: int) -> Tensor:
    slots, cumulative = _cumulative(phy2log, quotas, num_experts, num_gpus)
    found = (cumulative[ids] <= torch.minimum(nth, cumulative[ids, -1] - 1).unsqueeze(1)).sum(1)
    return torch.where(ids < 0, -1, slots[ids, found.clamp(max=slots.shape[1] - 1)])
