"""Transfers: from which slot of the placement in force each slot of the next one is filled, and in which batch; one
layer at a time."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import ints
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.places import Int32s, Slots, list_places

WORD = 62  # batches in a word of a mask


@stage
def choose_sources(
    ahead: Slots, live: Slots, num_experts: int, num_gpus: int, gpus_per_node: int, source: Int32s
) -> None:
    """Fill `source` [P] of one layer with the slot of `live` [P] that each slot of `ahead` [P] is filled from, slots
    ascending: on its own GPU; else on its node; else anywhere, by the GPU that has sent least so far. Ties: lowest
    slot. A slot that is kept, or is to hold none, is its own; -1 where no slot holds the expert."""
    size = ahead.size // num_gpus
    first, places = ints(num_experts + 1), ints(live.size)
    list_places(live, num_gpus, first, places)
    sent = np.zeros(num_gpus, np.int64)
    for slot in range(ahead.size):
        expert, taker = ahead[slot], slot // size
        source[slot] = slot
        if expert < 0 or expert == live[slot]:
            continue
        node = taker // gpus_per_node
        best, least, farthest = np.int64(-1), np.int64(0), 3
        for at in range(first[expert], first[expert + 1]):  # slots ascending: of equals the first one stays
            giver = places[at] // size
            far = 0 if giver == taker else 1 if giver // gpus_per_node == node else 2
            if far < farthest or (far == farthest and sent[giver] < least):
                best, least, farthest = places[at], sent[giver], far
        source[slot] = best
        if farthest in (1, 2):
            sent[best // size] += 1


@stage
def batch_transfers(source: Int32s, num_gpus: int, batch: Int32s) -> None:
    """Fill `batch` [P] of one layer: the lowest batch in which neither GPU takes part in another transfer, slots
    ascending; -1 for a slot that nothing comes to from another GPU."""
    size = source.size // num_gpus
    busy = np.zeros((source.size // WORD + 1, num_gpus), np.int64)  # bit: a batch that the GPU takes part in
    full = (np.int64(1) << WORD) - 1
    for slot in range(source.size):
        batch[slot] = -1
        giver, taker = source[slot] // size, slot // size
        if source[slot] >= 0 and giver != taker:
            word = 0
            while busy[word, giver] | busy[word, taker] == full:
                word += 1
            used, bit = busy[word, giver] | busy[word, taker], 0
            while used >> bit & 1:
                bit += 1
            busy[word, giver] |= np.int64(1) << bit
            busy[word, taker] |= np.int64(1) << bit
            batch[slot] = word * WORD + bit


@stage
def count_transfers(source: Int32s, batch: Int32s, num_gpus: int, gpus_per_node: int, counts: Int32s) -> None:
    """Fill `counts` [5] of one layer: slots copied within their GPU; fetched from another; of these, from another node;
    whose expert no slot holds; and batches."""
    node = source.size // num_gpus * gpus_per_node
    counts[:] = 0
    for slot in range(source.size):
        if source[slot] < 0:
            counts[3] += 1
        elif batch[slot] < 0:
            counts[0] += source[slot] != slot
        else:
            counts[1] += 1
            counts[2] += source[slot] // node != slot // node
            counts[4] = max(counts[4], batch[slot] + 1)
