"""Memory of a row, and the tuples of pointers that the stages take.

A row's scratch is one block of bytes: two arrays of 8-byte numbers, then fifteen of 4-byte ones, `shape.scratch`
elements each. Arrays that no two stages need at once share one.
"""
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from typing import Any, NamedTuple

import triton
import triton.language as tl

ROW_BYTES = tl.constexpr(76)  # of a row, an element of `shape.scratch`


class Maps(NamedTuple):
    """What a launch fills."""

    phy2log: Any  # integer [L, P]
    phyrank: Any  # integer [L, P]
    logcnt: Any  # integer [L, E]
    log2phy: Any  # integer [L, E, width], any strides but the last; None: not wanted
    bad: Any  # int32 [L, N]: lowest expert of the row with a bad load, else -1, or -2 where log2phy is too narrow


class Items(NamedTuple):
    """Items to be packed, their places, and scratch: None where the stage does not use it."""

    loads: Any  # float32 [num_items]
    labels: Any  # int32 [num_items], expert of each item
    item_at: Any  # int32 [num_items]: the item in slot k of pack q at q * capacity + k
    sorted: Any  # int64 [num_items + 40], scratch
    keys: Any  # int64 [pack_lanes], scratch
    fixed: Any  # int32 [num_items], the loads in fixed point
    spare: Any  # int32 [num_items], scratch
    pack_loads: Any  # float64 [num_packs], scratch


class Places(NamedTuple):
    """The state of an exchange, by place, pack * S + slot; and packs by position, load descending, then number."""

    item_at: Any  # int32 [num_items]
    load_at: Any  # int32 [num_items], fixed point
    label_at: Any  # int32 [num_items]
    order: Any  # int32 [num_packs], scratch: the pack at each position
    height: Any  # int32 [num_packs], scratch: its load
    spare: Any  # int32 [num_packs], scratch
    keys: Any  # int64 [pack_lanes], scratch


class Replicas(NamedTuple):
    """Experts of a row, the replica list that is made of them, and scratch."""

    loads: Any  # float32 [num_experts]
    expert: Any  # int32 [num_replicas], the replica list: expert of each replica
    rank: Any  # int32 [num_replicas], its rank within the expert
    counts: Any  # int32 [num_experts], replicas of each expert
    logical: Any  # int32 [num_experts], the expert's number in the layer
    average: Any  # float32 [num_experts], scratch
    spare: Any  # int32 [num_experts], scratch
    keys: Any  # int64 [replica_lanes], scratch


@triton.jit
def items_of(row_ptr, shape: tl.constexpr):
    """The groups of a layer, to be packed onto nodes, and later the replicas of a row, onto GPUs."""
    return Items(
        _floats(row_ptr, 24, shape), _ints(row_ptr, 32, shape), _ints(row_ptr, 40, shape), _longs(row_ptr, 0, shape),
        _longs(row_ptr, 8, shape), _ints(row_ptr, 52, shape), _ints(row_ptr, 48, shape), _doubles(row_ptr, 8, shape),
    )  # fmt: skip


@triton.jit
def places_of(row_ptr, shape: tl.constexpr):
    """The state of an exchange, of groups or of replicas."""
    return Places(
        _ints(row_ptr, 40, shape), _ints(row_ptr, 56, shape), _ints(row_ptr, 60, shape), _ints(row_ptr, 64, shape),
        _ints(row_ptr, 68, shape), _ints(row_ptr, 72, shape), _longs(row_ptr, 8, shape),
    )  # fmt: skip


@triton.jit
def replicas_of(row_ptr, shape: tl.constexpr):
    """The experts of a row and its replica list."""
    return Replicas(
        _floats(row_ptr, 16, shape), _ints(row_ptr, 32, shape), _ints(row_ptr, 36, shape), _ints(row_ptr, 44, shape),
        _ints(row_ptr, 28, shape), _floats(row_ptr, 20, shape), _ints(row_ptr, 48, shape), _longs(row_ptr, 0, shape),
    )  # fmt: skip


@triton.jit
def statistics_of(scratch_ptr, num_rows, shape: tl.constexpr):
    """float64 [3, num_rows], behind the rows."""
    return (scratch_ptr + num_rows.to(tl.int64) * (ROW_BYTES * shape.scratch)).to(tl.pointer_type(tl.float64))


@triton.jit
def _ints(row_ptr, AT: tl.constexpr, shape: tl.constexpr):
    return (row_ptr + AT * shape.scratch).to(tl.pointer_type(tl.int32))


@triton.jit
def _floats(row_ptr, AT: tl.constexpr, shape: tl.constexpr):
    return (row_ptr + AT * shape.scratch).to(tl.pointer_type(tl.float32))


@triton.jit
def _longs(row_ptr, AT: tl.constexpr, shape: tl.constexpr):
    return (row_ptr + AT * shape.scratch).to(tl.pointer_type(tl.int64))


@triton.jit
def _doubles(row_ptr, AT: tl.constexpr, shape: tl.constexpr):
    return (row_ptr + AT * shape.scratch).to(tl.pointer_type(tl.float64))
