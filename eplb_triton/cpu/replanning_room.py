"""Replanning: a move, and the room that the search for one needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_triton.cpu.arith import (
    Doubles,
    Flags,
    Floats,
    Ints,
    double_rows,
    doubles,
    flags,
    float_rows,
    floats,
    int_rows,
    ints,
)
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.replanning_potential import NO_SLOT


class Move(NamedTuple):
    """What a move gains a written slot, and what it writes; gain 0: no move."""

    gain: int
    slot: int
    other: int  # the slot that is swapped with it, or the expert that comes there


NO_MOVE = Move(np.int64(0), NO_SLOT, NO_SLOT)


class Changes(NamedTuple):
    """What becomes of some experts if each had one replica more, or fewer; T as in State."""

    expert: Ints  # [n]
    loads: Doubles  # [n, T], of one replica then
    difference: Doubles  # [n, T], of that and one now
    mean: Doubles  # [n], sum of the loads
    square: Doubles  # [n], sum of their squares
    spread: Doubles  # [n], of one replica then
    spread_difference: Doubles  # [n]
    fall: Ints  # [n], of F, nobody receiving or giving yet


class ReplicaRoom(NamedTuple):
    """For the search of a replica move; s slots of the heaviest GPU, d GPUs and n = s * d slots of its node."""

    wanted: Changes  # of s experts, with one replica more
    wanted_falls: Ints  # [s, d], of the power of each GPU of the node
    donors: Changes  # of n // 2 experts, with one replica fewer
    first: Ints  # [n // 2 + 1], first receiver of each donor
    donor_of: Ints  # [E], which donor an expert is, or NO_SLOT
    slot: Ints  # [n], of each receiver: by donor, then GPU; the lowest slot there
    gpu: Ints  # [n], of the node
    rest: Doubles  # [n, T], what its GPU carries without the replica given up
    sums: Doubles  # [3, n]: mean, T * square + spread, spread of that
    fall: Ints  # [n], of the power of its GPU while it has not given up its replica
    shared: Ints  # [s, n // 2]: beyond the two falls alone, where GPUs hold both a wanted expert and a donor
    gains: Doubles  # [s, n]
    products: Doubles  # [n]
    offset: Ints  # [n], of the gain: what the donor falls, and the power of the receiver before
    donor: Ints  # [n], which donor
    most: Doubles  # [s], bound of the gain of each wanted expert
    looked_at: Flags  # [s]
    row: Doubles  # [T]


@stage
def _new_changes(num_experts: int, width: int) -> Changes:
    n = num_experts
    return Changes(
        ints(n),
        double_rows(n, width),
        double_rows(n, width),
        doubles(n),
        doubles(n),
        doubles(n),
        doubles(n),
        ints(n),
    )


@stage
def new_replica_room(num_experts: int, num_slots: int, num_gpus: int, width: int) -> ReplicaRoom:
    """Room for replica moves on nodes of `num_gpus` GPUs; `width`: T."""
    s, n = num_slots, num_slots * num_gpus
    return ReplicaRoom(
        _new_changes(s, width),
        np.zeros((s, num_gpus), np.int64),
        _new_changes(n // 2, width),
        ints(n // 2 + 1),
        ints(num_experts),
        ints(n),
        ints(n),
        double_rows(n, width),
        double_rows(3, n),
        ints(n),
        int_rows(s, n // 2),
        double_rows(s, n),
        doubles(n),
        ints(n),
        ints(n),
        doubles(s),
        flags(s),
        doubles(width),
    )


class Room(NamedTuple):
    """For the search of a swap; s slots of the heaviest GPU, n of its node, by position."""

    factors: Floats  # [s, T], centred loads of the slots of the heaviest GPU, scaled
    products: Floats  # [s, n], scaled inner products of them and those of all positions
    gains: Floats  # [s, n], of two slots, about
    columns: Floats  # [6, n], see _fill_columns
    given: Floats  # [n], sum of the products of a slot of the heaviest GPU and those of each GPU
    best: Floats  # [n], largest gain of each position
    replicas: ReplicaRoom


@stage
def new_room(num_experts: int, num_slots: int, num_gpus: int, width: int) -> Room:
    """Room for moves on nodes of `num_gpus` GPUs; `width`: T, as in State."""
    s, n = num_slots, num_slots * num_gpus
    return Room(
        float_rows(s, width),
        float_rows(s, n),
        float_rows(s, n),
        float_rows(6, n),
        floats(n),
        floats(n),
        new_replica_room(num_experts, num_slots, num_gpus, width),
    )
