"""Exchange: items between heavy and light packs, until the heaviest is at its target or no exchange lightens it.

State of a call, one row per (layer, node) or per layer:
    loads      [rows, n] int32, fixed point: sums are exact, whatever their order
    labels     [rows, n] int64, expert of each item, 0 .. n - 1
    pack, slot [rows, n] int64, where each item is; every pack holds S = n / num_packs items
    target     [rows, 1] int32, pack load from which a row is done

Every `refine_*` returns new (pack, slot). An exchange never brings a label to a pack that holds it. Its value is the
larger of the two pack loads after it, and has to be below the heavier of the two before. Packs stand in order of
(load descending, number) throughout a round: position 0 is the heaviest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.fixed import PENALTY
from eplb_reference.meetings import Meetings, Packs, State

PACKS_PER_PROPOSER = 8  # from 32 packs up a match round repairs a share of them, not a number


def refine_pairs(
    loads: Tensor, labels: Tensor, pack: Tensor, slot: Tensor, num_packs: int, target: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Up to `rounds` times, every pack of the heavier half makes its best exchange with one of the lighter half.

    In round r the pack at position q meets the one at m - 1 - ((q + r) mod floor(m / 2)).

    Ties: the lowest slot of the heavier pack, then of the lighter one.
    """
    half, capacity = num_packs // 2, loads.shape[1] // num_packs
    if half == 0 or capacity == 1:
        return pack, slot
    state = State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    for r in range(rounds):
        rows, packs = Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy = packs.at(slice(0, half))
        light = packs.at(num_packs - 1 - (torch.arange(half) + r) % half)
        value, i, j = Meetings.of(state, heavy, light).exchanges()
        state.swap(rows, value < heavy.loads, heavy.order * capacity + i, light.order * capacity + j)
    return state.finish()


def refine_match(
    loads: Tensor,
    labels: Tensor,
    pack: Tensor,
    slot: Tensor,
    num_packs: int,
    target: Tensor,
    rounds: int,
    proposers: int,
) -> tuple[Tensor, Tensor]:
    """Up to `rounds` times, each of the heaviest packs that is above its row's target proposes its best exchange with
    any pack behind it; the heaviest go first, and no pack takes part in two. A row stops at its target, or before a
    round in which its heaviest pack has no proposal. There are `proposers` of them, or an eighth of all packs if that
    is more, but at most half.

    Ties: the heavier partner, then the lowest slot of the proposer, then of the partner.
    """
    proposers = min(max(proposers, num_packs // PACKS_PER_PROPOSER), num_packs // 2)
    capacity = loads.shape[1] // num_packs
    if proposers == 0 or capacity == 1:
        return pack, slot
    state = State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    before = torch.arange(1, num_packs) <= torch.arange(proposers).unsqueeze(1)
    for _ in range(rounds):
        rows, packs = Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy = packs.at(slice(0, proposers), face=-1)
        meetings = Meetings.of(state, heavy, packs.at(slice(1, None), face=-2))
        best = meetings.values().masked_fill_(before, PENALTY).argmin(2, keepdim=True)  # [rows, proposers, 1]
        value, i, j = (found.squeeze(2) for found in meetings.choose(best).exchanges())
        partner = best.squeeze(2) + 1
        heavy_loads = packs.loads[:, :proposers]
        proposes = (value < heavy_loads) & (heavy_loads > target[rows])
        granted = _grant(proposes & proposes[:, :1], partner)
        at_i = packs.order[:, :proposers] * capacity + i
        state.swap(rows, granted, at_i, packs.order.gather(1, partner) * capacity + j)
        rows = rows[granted[:, 0]]
    return state.finish()


def _grant(proposes: Tensor, partner: Tensor) -> Tensor:
    """[rows, proposers]: the proposals that stand, in position order, each pack taking part in one exchange."""
    granted = proposes.clone()
    for q in range(1, proposes.shape[1]):
        taken = (partner[:, :q] == partner[:, q : q + 1]) | (partner[:, :q] == q)
        granted[:, q] &= ~(granted[:, :q] & taken).any(1)
    return granted


def refine_doubles(
    loads: Tensor,
    labels: Tensor,
    pack: Tensor,
    slot: Tensor,
    num_packs: int,
    target: Tensor,
    steps: int,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Up to `steps` times, the best exchange of two items of the heaviest pack for two of one of the lightest, of which
    as many are met as `candidates` pairs of pairs allow. A row stops at its target or when no exchange gains.

    Ties: the heavier partner, then the lowest slots of the heaviest pack, then of the partner (two: lexicographic).
    """
    capacity = loads.shape[1] // num_packs
    num_pairs = capacity * (capacity - 1) // 2
    if num_packs == 1 or num_pairs == 0 or candidates < num_pairs * num_pairs:
        return pack, slot
    pairs = torch.triu_indices(capacity, capacity, 1)
    partners = min(num_packs - 1, candidates // (num_pairs * num_pairs))
    state = State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    for _ in range(steps):
        rows, packs = Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy, light = packs.at(slice(0, 1)), packs.at(slice(num_packs - partners, None))
        meetings = Meetings.of(state, heavy, light, pairs)
        best = meetings.values().argmin(1, keepdim=True)
        value, i, j = meetings.choose(best).exchanges()  # [rows, 1]
        gains = value < heavy.loads
        at_i = heavy.order * capacity + pairs[:, i[:, 0]].T
        at_j = light.order.gather(1, best) * capacity + pairs[:, j[:, 0]].T
        state.swap(rows, gains.expand(-1, 2), at_i, at_j)
        rows = rows[gains[:, 0]]
    return state.finish()
