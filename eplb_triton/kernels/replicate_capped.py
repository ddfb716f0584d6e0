"""Counts: D'Hondt with no more replicas of an expert than there are GPUs."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import LOWEST, bits, divide, largest
from eplb_triton.kernels.replicate import pick_dhondt


@triton.jit
def capped_counts(replicas, shape: tl.constexpr):
    """Counts [expert_lanes] int32: replica after replica to the expert of largest replica load among those of fewer
    than num_packs.

    The cap is lifted where that many replicas cannot be held without two on a GPU. Idle rows get theirs spread evenly.
    Ties: lowest expert. Where D'Hondt's counts stay within the cap they are the answer; few rows need the capped picks.
    """
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    NUM_REPLICAS: tl.constexpr = shape.num_replicas
    NUM_PACKS: tl.constexpr = shape.num_packs
    CAP: tl.constexpr = NUM_PACKS if NUM_REPLICAS <= NUM_EXPERTS * NUM_PACKS else NUM_REPLICAS
    expert = tl.arange(0, shape.expert_lanes)
    counts = (expert < NUM_EXPERTS).to(tl.int32)
    if NUM_REPLICAS > NUM_EXPERTS:
        loads = tl.load(replicas.loads + expert, mask=expert < NUM_EXPERTS, other=0.0)
        idle = tl.max(bits(loads), 0) == 0
        counts = pick_dhondt(replicas, counts, NUM_EXPERTS, NUM_REPLICAS, False, True, shape)
        if (tl.max(counts, 0) > CAP) | idle:
            counts = _pick_capped(tl.where(idle, 1.0, loads), expert, NUM_REPLICAS - NUM_EXPERTS, CAP, NUM_EXPERTS)
    return counts


@triton.jit
def _pick_capped(loads, expert, picks, CAP: tl.constexpr, NUM_EXPERTS: tl.constexpr):
    """Counts after so many picks of the largest replica load among experts of fewer than CAP replicas."""
    keys = tl.where(expert < NUM_EXPERTS, bits(loads), LOWEST)
    counts = (expert < NUM_EXPERTS).to(tl.int32)
    for _ in tl.range(0, picks):
        _, chosen = largest(keys, expert)
        counts += (expert == chosen).to(tl.int32)
        share = tl.where(counts < CAP, bits(divide(loads, tl.maximum(counts, 1))), LOWEST)
        keys = tl.where(expert == chosen, share, keys)
    return counts
