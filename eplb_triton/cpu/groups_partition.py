"""Partition: groups onto nodes so that the heaviest node is as light as it can be."""

from __future__ import annotations

import numpy as np

from eplb_triton.cpu.arith import Floats, Ints, counting, doubles
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.fixed import fixed_point
from eplb_triton.cpu.pack import pack_plain
from eplb_triton.cpu.refine_exchange import refine_match

EXCHANGES_PER_ITEM = 4
ONE = np.int64(1)


@stage
def pack_partition(loads: Floats, num_packs: int, pack: Ints, slot: Ints, table: Ints, work: Ints, tree: Ints) -> None:
    """Fill pack and slot of each item by the partition whose heaviest pack is lightest, in fixed point.

    table [partitions, items] has the items of all packs of every partition in order; empty if there are too many: then
    `pack_plain` and the best exchange with the heaviest pack, until none gains. Ties: the first partition.
    """
    n = loads.size
    capacity = n // num_packs
    fixed = doubles(n)
    fixed_point(loads, capacity, fixed)
    if table.shape[0] == 0:
        pack_plain(loads, num_packs, pack, slot, work, tree)
        refine_match(fixed, counting(n), pack, slot, num_packs, 0.0, EXCHANGES_PER_ITEM * n, ONE)
        return
    best, least = 0, np.inf
    for way in range(table.shape[0]):
        heaviest = 0.0
        for q in range(num_packs):
            load = 0.0
            for k in range(q * capacity, (q + 1) * capacity):
                load += fixed[table[way, k]]
            heaviest = max(heaviest, load)
        if heaviest < least:
            best, least = way, heaviest
    for k in range(n):
        pack[table[best, k]] = k // capacity
        slot[table[best, k]] = k % capacity
