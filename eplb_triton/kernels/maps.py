"""Write the maps of a row into those of its layer."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl


@triton.jit
def physical_maps(
    item_at_ptr,  # int32 [num_replicas], replica in each slot of the row
    replicas,
    first_slot,  # of the row, within the layer
    maps,  # Maps of the layer; `bad` of the row
    log2phy_stride,  # of an expert
    WIDTH: tl.constexpr,  # of log2phy
    WIDTH_LANES: tl.constexpr,
    shape: tl.constexpr,  # Replicating
):
    """Physical slot of a replica = first_slot + its slot in the row; log2phy is padded with -1, and holds the replicas
    of the WIDTH lowest ranks: where an expert has more, and no load of the row was bad, `bad` becomes -2."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    NUM_REPLICAS: tl.constexpr = shape.num_replicas
    row_expert = tl.arange(0, shape.expert_lanes)
    row_logical = tl.load(replicas.logical + row_expert, mask=row_expert < NUM_EXPERTS, other=0)
    counts = tl.load(replicas.counts + row_expert, mask=row_expert < NUM_EXPERTS, other=0)
    tl.store(maps.logcnt + row_logical, counts, mask=row_expert < NUM_EXPERTS)
    slot = tl.arange(0, shape.replica_lanes)
    there = slot < NUM_REPLICAS
    replica = tl.load(item_at_ptr + slot, mask=there, other=0)
    rank = tl.load(replicas.rank + replica, mask=there, other=0)
    expert = tl.load(replicas.expert + replica, mask=there, other=0)
    phy2log = tl.load(replicas.logical + expert, mask=there, other=0)
    tl.store(maps.phy2log + first_slot + slot, phy2log, mask=there)
    tl.store(maps.phyrank + first_slot + slot, rank, mask=there)
    if maps.log2phy is not None:
        if WIDTH <= NUM_REPLICAS - NUM_EXPERTS:
            bad = tl.load(maps.bad)
            crowded = (tl.max(counts, 0) > WIDTH) & (bad == -1)
            tl.debug_barrier()
            tl.store(maps.bad, tl.where(crowded, -2, bad))
        tl.store(maps.log2phy + phy2log * log2phy_stride + rank, first_slot + slot, mask=there & (rank < WIDTH))
        # The padding apart from the slots: no entry is written twice, so nothing need be ordered.
        OWNERS: tl.constexpr = 1024 // WIDTH_LANES if WIDTH_LANES < 1024 else 1
        entry = tl.arange(0, OWNERS * WIDTH_LANES)
        column = entry % WIDTH_LANES
        for first in tl.range(0, NUM_EXPERTS, OWNERS):
            owner = first + entry // WIDTH_LANES
            count = tl.load(replicas.counts + owner, mask=owner < NUM_EXPERTS, other=WIDTH)
            target = tl.load(replicas.logical + owner, mask=owner < NUM_EXPERTS, other=0)
            padded = (column >= count) & (column < WIDTH)
            tl.store(maps.log2phy + target * log2phy_stride + column, tl.zeros_like(entry) - 1, mask=padded)
