"""Counts: D'Hondt with no more replicas of an expert than there are GPUs."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import LOWEST, bits, divide, largest
from eplb_triton.kernels.replicate import pick_dhondt


@triton.jit
def capped_counts(
    weights_ptr,  # float32 [NUM_EXPERTS]
    offsets_ptr,  # int32 [NUM_EXPERTS], scratch of `pick_dhondt`; None: one pick at a time
    NUM_REPLICAS: tl.constexpr,
    NUM_PACKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Counts [EXPERTS] int32: replica after replica to the expert of largest w / c among those of fewer than NUM_PACKS.

    The cap is lifted where that many replicas cannot be held without two on a GPU. Idle rows get theirs spread evenly.
    Ties: lowest expert. Where D'Hondt's counts stay within the cap they are the answer; few rows need the capped picks.
    """
    CAP: tl.constexpr = NUM_PACKS if NUM_REPLICAS <= NUM_EXPERTS * NUM_PACKS else NUM_REPLICAS
    expert = tl.arange(0, EXPERTS)
    counts = (expert < NUM_EXPERTS).to(tl.int32)
    if NUM_REPLICAS > NUM_EXPERTS:
        weights = tl.load(weights_ptr + expert, mask=expert < NUM_EXPERTS, other=0.0)
        idle = tl.max(bits(weights), 0) == 0
        counts = pick_dhondt(
            weights_ptr, counts, None, None, NUM_EXPERTS, NUM_REPLICAS, offsets_ptr, NUM_EXPERTS, EXPERTS, 1
        )
        if (tl.max(counts, 0) > CAP) | idle:
            counts = _pick_capped(tl.where(idle, 1.0, weights), expert, NUM_REPLICAS - NUM_EXPERTS, CAP, NUM_EXPERTS)
    return counts


@triton.jit
def _pick_capped(weights, expert, picks, CAP: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """Counts after so many picks of the largest w / c among experts of fewer than CAP replicas."""
    keys = tl.where(expert < NUM_EXPERTS, bits(weights), LOWEST)
    counts = (expert < NUM_EXPERTS).to(tl.int32)
    for _ in tl.range(0, picks):
        _, chosen = largest(keys, expert)
        counts += (expert == chosen).to(tl.int32)
        share = tl.where(counts < CAP, bits(divide(weights, tl.maximum(counts, 1))), LOWEST)
        keys = tl.where(expert == chosen, share, keys)
    return counts
