"""Routing: which physical slot each token of a step goes to, by the quotas of its experts.

A *place* is as in splitting.py. Where the quotas of an expert are all 0, each place counts as having 1.
"""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Ints, ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.places import Int32s, Slots, list_places

WORD = np.int64(0xFFFFFFFF)
ROW, LAYER, SALT = np.int64(0x9E3779B1), np.int64(0x85EBCA77), np.int64(0xC2B2AE3D)
FIRST, SECOND = np.int64(0x7FEB352D), np.int64(0x846CA68B)


@stage
def exact_slots(topk_ids: Slots, phy2log: Slots, quotas: Int32s, offsets: Int32s, num_gpus: int, slots: Slots) -> None:
    """Fill `slots` [tokens, k]: the g-th token of an expert, counted over ranks, goes to the first place in slot order
    whose cumulative quota exceeds g; one beyond all quotas to the last of them."""
    num_experts = offsets.size
    first, places = ints(num_experts + 1), ints(phy2log.size)
    list_places(phy2log, num_gpus, first, places)
    ends = _cumulative(quotas, first, places)
    nth, at = offsets.astype(np.int64), first[:-1].copy()  # of each expert: its next token, and the place of the last
    for row in range(topk_ids.shape[0]):
        for column in range(topk_ids.shape[1]):
            expert = topk_ids[row, column]
            if expert < 0 or first[expert] == first[expert + 1]:
                slots[row, column] = -1
                continue
            place, last = at[expert], first[expert + 1] - 1
            wanted = min(nth[expert], ends[last] - 1)
            while ends[place] <= wanted:  # tokens of an expert come in order, so its place only moves on
                place += 1
            slots[row, column] = places[place]
            at[expert] = place
            nth[expert] += 1


@stage
def hashed_slots(
    topk_ids: Slots,
    phy2log: Slots,
    quotas: Int32s,
    num_experts: int,
    num_gpus: int,
    layer: int,
    salt: int,
    slots: Slots,
) -> None:
    """Fill `slots` [tokens, k] by a hash of (row, layer, salt), in proportion to the quotas: of one row, one hash."""
    first, places = ints(num_experts + 1), ints(phy2log.size)
    list_places(phy2log, num_gpus, first, places)
    ends = _cumulative(quotas, first, places)
    mixed = (layer * LAYER ^ salt * SALT) & WORD
    for row in range(topk_ids.shape[0]):
        x = (row * ROW & WORD) ^ mixed
        x = (x ^ x >> 16) * FIRST & WORD
        x = (x ^ x >> 15) * SECOND & WORD
        x = x ^ x >> 16
        for column in range(topk_ids.shape[1]):
            expert = topk_ids[row, column]
            if expert < 0 or first[expert] == first[expert + 1]:
                slots[row, column] = -1
                continue
            place = first[expert]
            wanted = x * ends[first[expert + 1] - 1] >> 32  # below 2^63: the total is below 2^31
            while ends[place] <= wanted:
                place += 1
            slots[row, column] = places[place]


@stage
def fill_table(phy2log: Slots, quotas: Int32s, num_experts: int, num_gpus: int, width: int, table: Slots) -> None:
    """Fill `table` [E, width] of one layer: places repeated in proportion to their quotas, by largest remainder of
    quota * width / sum, ties lowest slot; in slot order. Experts without a place: -1."""
    first, places = ints(num_experts + 1), ints(phy2log.size)
    list_places(phy2log, num_gpus, first, places)
    ends = _cumulative(quotas, first, places)
    times, left = ints(num_gpus), ints(num_gpus)
    for expert in range(num_experts):
        own, end = places[first[expert] : first[expert + 1]], ends[first[expert] : first[expert + 1]]
        if own.size == 0:
            table[expert, :] = -1
            continue
        more = width
        for i in range(own.size):
            share = end[i] - (end[i - 1] if i > 0 else 0)
            times[i], left[i] = divmod(share * width, end[own.size - 1])
            more -= times[i]
        for _ in range(more):
            best = np.argmax(left[: own.size])  # ties: lowest slot
            times[best] += 1
            left[best] = -1
        column = 0
        for i in range(own.size):
            table[expert, column : column + times[i]] = own[i]
            column += times[i]


@stage
def _cumulative(quotas: Int32s, first: Ints, places: Ints) -> Ints:
    """Of each place, the quotas of its expert up to and with it."""
    ends = ints(places.size)
    for expert in range(first.size - 1):
        total = np.int64(0)
        for at in range(first[expert], first[expert + 1]):
            total += quotas[places[at]]
            ends[at] = total
        if total == 0:
            for at in range(first[expert], first[expert + 1]):
                ends[at] = at - first[expert] + 1
    return ends
