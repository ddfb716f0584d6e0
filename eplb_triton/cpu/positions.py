"""The state of an exchange: packs in position order, and what each holds, kept while items are exchanged."""

from __future__ import annotations

from typing import NamedTuple

from eplb_triton.cpu.arith import Doubles, Flags, Ints, counting, double_rows, doubles, flags, int_rows, ints
from eplb_triton.cpu.compiled import stage


class State(NamedTuple):
    """Packs by position; slots first, so that loops over the packs behind one run along memory."""

    order: Ints  # [m], pack number
    totals: Doubles  # [m], by pack number
    heights: Doubles  # [m], load
    items: Ints  # [S, m]
    gives: Doubles  # [S, m], load of the item
    left: Doubles  # [S, m], load without the item
    labels: Ints  # [S, m]
    members: Ints  # [m * S], item at pack * S + slot
    shared: Flags  # [n], by label: whether it has two items


@stage
def new_state(loads: Doubles, labels: Ints, pack: Ints, slot: Ints, num_packs: int) -> State:
    n, m = loads.size, num_packs
    capacity = n // m
    state = State(
        counting(m),
        doubles(m),
        doubles(m),
        int_rows(capacity, m),
        double_rows(capacity, m),
        double_rows(capacity, m),
        int_rows(capacity, m),
        ints(n),
        flags(n),
    )
    seen = flags(n)
    state.totals[:] = 0
    state.shared[:] = False
    seen[:] = False
    for i in range(n):
        state.members[pack[i] * capacity + slot[i]] = i
        state.totals[pack[i]] += loads[i]
        state.shared[labels[i]] = seen[labels[i]]
        seen[labels[i]] = True
    return state


@stage
def stand_packs(state: State, loads: Doubles, labels: Ints) -> None:
    """Put the packs into position: by insertion, few move between two rounds."""
    order, totals = state.order, state.totals
    for k in range(1, order.size):
        q = order[k]
        at = k
        while at > 0 and (
            totals[order[at - 1]] < totals[q] or (totals[order[at - 1]] == totals[q] and order[at - 1] > q)
        ):
            order[at] = order[at - 1]
            at -= 1
        order[at] = q
    capacity = state.items.shape[0]
    for at in range(order.size):
        state.heights[at] = totals[order[at]]
        for k in range(capacity):
            item = state.members[order[at] * capacity + k]
            state.items[k, at] = item
            state.gives[k, at] = loads[item]
            state.left[k, at] = state.heights[at] - loads[item]
            state.labels[k, at] = labels[item]


@stage
def exchange_items(state: State, loads: Doubles, pack: Ints, slot: Ints, i: int, j: int) -> None:
    """Exchange the positions of items i and j."""
    capacity = state.items.shape[0]
    of_i, of_j = pack[i], pack[j]
    state.totals[of_i] += loads[j] - loads[i]
    state.totals[of_j] += loads[i] - loads[j]
    pack[i], pack[j] = of_j, of_i
    slot[i], slot[j] = slot[j], slot[i]
    state.members[pack[i] * capacity + slot[i]] = i
    state.members[pack[j] * capacity + slot[j]] = j


@stage
def holds_label(state: State, at: int, label: int) -> bool:
    """Whether the pack at a position holds an item of `label`."""
    if state.shared[label]:
        for k in range(state.items.shape[0]):
            if state.labels[k, at] == label:
                return True
    return False
