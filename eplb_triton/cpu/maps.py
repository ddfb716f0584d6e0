"""Maps: from packed replicas to physical slots."""

from __future__ import annotations

from eplb_triton.cpu.arith import Ints
from eplb_triton.cpu.compiled import stage


@stage
def physical_maps(
    pack: Ints,
    slot: Ints,
    expert: Ints,
    rank: Ints,
    counts: Ints,
    experts: Ints,
    num_packs: int,
    node: int,
    phy2log: Ints,
    phyrank: Ints,
    logcnt: Ints,
) -> None:
    """Enter one row, its replicas (expert, rank) packed at (pack, slot), into the maps of its layer.

    experts [e] is the logical expert of each expert of the row.
    """
    num_replicas = expert.size
    slots_per_gpu = num_replicas // num_packs
    for k in range(num_replicas):
        physical = node * num_replicas + pack[k] * slots_per_gpu + slot[k]
        phy2log[physical] = experts[expert[k]]
        phyrank[physical] = rank[k]
    for i in range(counts.size):
        logcnt[experts[i]] = counts[i]
