"""Counting: the ids of a step, and the tokens of physical slots, by expert. Integer atomics: any order, one result."""
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST


@triton.jit
def count_ids(
    ids,  # integer tile; what is no expert is left out
    counts_ptr,  # int32 [NUM_EXPERTS], added to
    bad_ptr,  # int32, set to 1 where a count leaves int32
    NUM_EXPERTS: tl.constexpr,
):
    """Count ids. One expert is met at most once a token, so that few atomics wait for one another."""
    known = (ids >= 0) & (ids < NUM_EXPERTS)
    _add(counts_ptr + tl.where(known, ids, 0), known.to(tl.int32), known, bad_ptr)


@triton.jit
def count_slots(
    tokens,  # int32 tile, at least 0, tokens of each slot
    owner,  # integer tile, expert of each slot, -1 for none
    counts_ptr,  # int32 [E], added to
    bad_ptr,  # int32, set to 1 where a count leaves int32
):
    """Add the tokens of physical slots to the counts of their experts."""
    _add(counts_ptr + tl.maximum(owner, 0), tokens, owner >= 0, bad_ptr)


@triton.jit
def _add(pointers, tokens, there, bad_ptr):
    before = tl.atomic_add(pointers, tokens, mask=there, sem="relaxed")
    room = -tokens + HIGHEST  # Triton 3.8's interpreter takes no difference of a constant and a tensor for one
    if tl.max((there & (before > room)).to(tl.int32), 0) > 0:
        tl.store(bad_ptr, 1)
