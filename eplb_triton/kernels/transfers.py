"""Transfers: from which slot of the placement in force each slot of the next one is filled, and in which batch; one
program a layer.

Both are serial, a step for every slot that is written. What a step must know lies in registers, a lane for every slot
or GPU, so that no step waits for memory that another lane wrote.
"""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, lowest_free

WORD = tl.constexpr(32)  # batches in a mask


@triton.jit
def choose_sources(
    ahead_ptr,  # integer [P], expert in each slot of the layer
    live_ptr,  # integer [P]
    GPUS_PER_NODE: tl.constexpr,
    source_ptr,  # int32 [P], out
    shape: tl.constexpr,  # SplitShape
):
    """The slot of `live` that each slot of `ahead` is filled from, slots ascending: on its own GPU; else on its node;
    else anywhere, by the GPU that has sent least so far. Ties: lowest slot. A slot that is kept, or is to hold none, is
    its own; -1 where no slot holds the expert."""
    SLOTS: tl.constexpr = shape.slots
    FAR: tl.constexpr = shape.replicas * shape.replicas  # of a key: how far, then what its GPU has sent, then the slot
    lane = tl.arange(0, shape.replicas)
    there = lane < shape.num_replicas
    before = tl.load(live_ptr + lane, mask=there, other=-1).to(tl.int32)
    after = tl.load(ahead_ptr + lane, mask=there, other=-1).to(tl.int32)
    written = there & (after != before) & (after >= 0) & (after < shape.num_experts)
    tl.store(source_ptr + lane, lane, mask=there & (written == 0))
    gpu = lane // SLOTS
    # What its GPU has sent counts in steps of the number of lanes. Made from `before`, a key lies in the registers
    # where that does: else it goes through shared memory at every step.
    key = tl.where(before >= 0, lane, 0)
    left = tl.where(written, lane, HIGHEST)
    slot = tl.min(left, 0)
    while slot < HIGHEST:
        expert = tl.load(ahead_ptr + slot).to(tl.int32)
        taker = slot // SLOTS
        far = tl.where(gpu // GPUS_PER_NODE == taker // GPUS_PER_NODE, FAR, 2 * FAR)
        best = tl.min(tl.where(before == expert, tl.where(gpu == taker, lane, far + key), HIGHEST), 0)
        source = tl.where(best == HIGHEST, -1, best % shape.replicas)
        tl.store(source_ptr + slot, source)
        sends = (best >= FAR) & (best < HIGHEST) & (gpu == source // SLOTS)
        key += tl.where(sends, shape.replicas, 0)
        left = tl.where(left == slot, HIGHEST, left)
        slot = tl.min(left, 0)


@triton.jit
def batch_transfers(
    source_ptr,  # int32 [P], from `choose_sources`
    batch_ptr,  # int32 [P], out
    shape: tl.constexpr,  # SplitShape
):
    """The lowest batch in which neither GPU takes part in another transfer, slots ascending; -1 for a slot that nothing
    comes to from another GPU. What does not fit into a mask of 32 batches is left for the next 32, in its order."""
    SLOTS: tl.constexpr = shape.slots
    lane = tl.arange(0, shape.replicas)
    there = lane < shape.num_replicas
    source = tl.load(source_ptr + lane, mask=there, other=-1)
    fetched = (source >= 0) & (source // SLOTS != lane // SLOTS)
    tl.store(batch_ptr + lane, tl.zeros_like(lane) - 1, mask=there & (fetched == 0))
    gpu = tl.arange(0, shape.gpus)
    left = tl.where(fetched, lane, HIGHEST)
    base = 0
    slot = tl.min(left, 0)
    while slot < HIGHEST:
        busy = tl.zeros_like(gpu)
        later = tl.zeros_like(lane) + HIGHEST
        while slot < HIGHEST:
            mine = (gpu == slot // SLOTS) | (gpu == tl.load(source_ptr + slot) // SLOTS)
            bit = lowest_free(tl.where(mine, busy, 0))
            if bit < WORD:
                tl.store(batch_ptr + slot, base + bit)
                busy = busy | tl.where(mine, 1 << bit, 0)
            else:
                later = tl.where(left == slot, lane, later)
            left = tl.where(left == slot, HIGHEST, left)
            slot = tl.min(left, 0)
        left = later
        slot = tl.min(left, 0)
        base += WORD


@triton.jit
def count_transfers(
    source_ptr,  # int32 [P]
    batch_ptr,  # int32 [P]
    GPUS_PER_NODE: tl.constexpr,
    counts_ptr,  # int32 [5], out
    shape: tl.constexpr,  # SplitShape
):
    """Slots copied within their GPU; fetched from another; of these, from another node; whose expert no slot holds; and
    batches."""
    NODE: tl.constexpr = shape.slots * GPUS_PER_NODE
    lane = tl.arange(0, shape.replicas)
    there = lane < shape.num_replicas
    source = tl.load(source_ptr + lane, mask=there, other=0)
    batch = tl.load(batch_ptr + lane, mask=there, other=-1)
    fetched = batch >= 0
    copied = there & (source >= 0) & (fetched == 0) & (source != lane)
    tl.store(counts_ptr, tl.sum(copied.to(tl.int32), 0))
    tl.store(counts_ptr + 1, tl.sum(fetched.to(tl.int32), 0))
    tl.store(counts_ptr + 2, tl.sum((fetched & (source // NODE != lane // NODE)).to(tl.int32), 0))
    tl.store(counts_ptr + 3, tl.sum((there & (source < 0)).to(tl.int32), 0))
    tl.store(counts_ptr + 4, tl.max(batch, 0) + 1)
