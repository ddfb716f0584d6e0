"""Write the maps of a row into those of its layer."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl


@triton.jit
def physical_maps(
    item_at_ptr,  # int32 [NUM_REPLICAS], replica in each slot of the row
    expert_ptr,  # int32 [NUM_REPLICAS], the replica list: row expert
    rank_ptr,  # int32 [NUM_REPLICAS], and its rank within the expert
    counts_ptr,  # int32 [NUM_EXPERTS], replicas of each row expert
    logical_ptr,  # int32 [NUM_EXPERTS], logical expert of each row expert
    first_slot,  # of the row, within the layer
    phy2log_ptr,  # integer [P], out, of the layer
    phyrank_ptr,  # integer [P], out
    logcnt_ptr,  # integer [E], out
    log2phy_ptr,  # integer [E, MOST], out; None: not wanted
    NUM_EXPERTS: tl.constexpr,
    NUM_REPLICAS: tl.constexpr,
    MOST: tl.constexpr,
    EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
    RANKS: tl.constexpr,  # a power of two, at least MOST
):
    """Physical slot of a replica = first_slot + its slot in the row; log2phy is padded with -1."""
    row_expert = tl.arange(0, EXPERTS)
    row_logical = tl.load(logical_ptr + row_expert, mask=row_expert < NUM_EXPERTS, other=0)
    counts = tl.load(counts_ptr + row_expert, mask=row_expert < NUM_EXPERTS, other=0)
    tl.store(logcnt_ptr + row_logical, counts, mask=row_expert < NUM_EXPERTS)
    slot = tl.arange(0, REPLICAS)
    there = slot < NUM_REPLICAS
    replica = tl.load(item_at_ptr + slot, mask=there, other=0)
    rank = tl.load(rank_ptr + replica, mask=there, other=0)
    expert = tl.load(expert_ptr + replica, mask=there, other=0)
    phy2log = tl.load(logical_ptr + expert, mask=there, other=0)
    tl.store(phy2log_ptr + first_slot + slot, phy2log, mask=there)
    tl.store(phyrank_ptr + first_slot + slot, rank, mask=there)
    if log2phy_ptr is not None:
        tl.store(log2phy_ptr + phy2log * MOST + rank, first_slot + slot, mask=there)
        # The padding apart from the slots: no entry is written twice, so nothing need be ordered.
        OWNERS: tl.constexpr = 1024 // RANKS if RANKS < 1024 else 1
        entry = tl.arange(0, OWNERS * RANKS)
        column = entry % RANKS
        for first in tl.range(0, NUM_EXPERTS, OWNERS):
            owner = first + entry // RANKS
            count = tl.load(counts_ptr + owner, mask=owner < NUM_EXPERTS, other=MOST)
            target = tl.load(logical_ptr + owner, mask=owner < NUM_EXPERTS, other=0)
            padded = (column >= count) & (column < MOST)
            tl.store(log2phy_ptr + target * MOST + column, tl.zeros_like(entry) - 1, mask=padded)
