"""Sorts of int64 keys."""
# ruff: noqa: N803, N806, RET505
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

APART_FROM = tl.constexpr(128)
"""Keys from which a sort is a function of its own, called with the keys in memory: one for all sorts of a size, and the
compiler, which takes a second over a sort that stands between other code, takes a tenth. Below, memory costs a tenth of
the sort."""


@triton.jit
def sort_descending(
    keys,  # int64 [LANES]
    keys_ptr,  # int64 [LANES], scratch
    LOOPED: tl.constexpr = False,  # in loops, which are slower: 42 operations to compile, not 687 (512 keys)
):
    """The keys, largest first."""
    LANES: tl.constexpr = keys.shape[0]
    if LANES < APART_FROM:
        return tl.sort(keys, descending=True)
    else:
        lane = tl.arange(0, LANES)
        tl.store(keys_ptr + lane, keys)
        tl.debug_barrier()
        if LOOPED:
            _sort_in_loops(keys_ptr, LANES)
        else:
            _sort_in_memory(keys_ptr, LANES)
        keys = tl.load(keys_ptr + lane)
        tl.debug_barrier()
        return keys


@triton.jit(noinline=True)
def _sort_in_memory(keys_ptr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    keys = tl.load(keys_ptr + lane)
    tl.debug_barrier()
    tl.store(keys_ptr + lane, tl.sort(keys, descending=True))
    tl.debug_barrier()


@triton.jit(noinline=True)
def _sort_in_loops(keys_ptr, LANES: tl.constexpr):
    """Bitonic: runs of `size` keys, falling and rising in turn, by pairs that are `apart`."""
    pair = tl.arange(0, LANES // 2)
    size = 2
    while size <= LANES:
        apart = size // 2
        while apart > 0:
            low = 2 * pair - (pair & (apart - 1))
            one, other = tl.load(keys_ptr + low), tl.load(keys_ptr + low + apart)
            exchanged = (one < other) == ((low & size) == 0)
            tl.debug_barrier()
            tl.store(keys_ptr + low, tl.where(exchanged, other, one))
            tl.store(keys_ptr + low + apart, tl.where(exchanged, one, other))
            tl.debug_barrier()
            apart = apart // 2
        size = size * 2
