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

from eplb_reference.arith import indices
from eplb_reference.meetings import BANNED, Meetings, Packs, State
from eplb_triton.constants import num_partners, num_proposers


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
    state = State.start(loads, labels, pack, slot, num_packs, target)
    for r in range(rounds):
        if state.is_done():
            break
        packs = Packs.of(state)
        heavy = packs.at(slice(0, half))
        light = packs.at(num_packs - 1 - (indices(half) + r) % half)
        left, i, j = Meetings.of(heavy, light).exchanges()
        gains = left < heavy.loads - light.loads
        state.swap(gains & (packs.loads[:, :1] > state.target), heavy.order, i, light.order, j)
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
    proposers = num_proposers(proposers, num_packs)
    capacity = loads.shape[1] // num_packs
    if proposers == 0 or capacity == 1:
        return pack, slot
    state = State.start(loads, labels, pack, slot, num_packs, target)
    not_behind = indices(num_packs, start=1) <= indices(proposers).unsqueeze(1)
    for _ in range(rounds):
        if state.is_done():
            break
        packs = Packs.of(state)
        meetings = Meetings.of(packs.at(slice(0, proposers), face=-1), packs.at(slice(1, None), face=-2))
        height = packs.loads[:, 1:].unsqueeze(1) + meetings.least()  # with the proposer's load, twice the value
        height, partner = height.masked_fill_(not_behind, BANNED).min(2, keepdim=True)  # [rows, proposers, 1]
        _, i, j = (found.squeeze(2) for found in meetings.choose(partner).exchanges())
        height, partner = height.squeeze(2), partner.squeeze(2) + 1
        loads, order = packs.loads[:, :proposers], packs.order[:, :proposers]
        proposes = (height < loads) & (loads > state.target)
        granted = _grant(proposes & proposes[:, :1], partner)
        state.swap(granted, order, i, packs.order.gather(1, partner), j)
        state.keep(granted[:, 0])
    return state.finish()


def _grant(proposes: Tensor, partner: Tensor) -> Tensor:
    """[rows, proposers]: the proposals that stand, in position order, each pack taking part in one exchange."""
    granted = proposes.clone()
    position = indices(proposes.shape[1])
    clash = (partner.unsqueeze(2) == partner.unsqueeze(1)) | (partner.unsqueeze(1) == position.unsqueeze(1))
    for q in range(1, proposes.shape[1]):
        granted[:, q] &= ~(granted[:, :q] & clash[:, q, :q]).any(1)
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
    partners = num_partners(candidates, capacity, num_packs)
    if partners == 0:
        return pack, slot
    pairs = torch.triu_indices(capacity, capacity, 1, dtype=torch.int64, device="cpu")
    state = State.start(loads, labels, pack, slot, num_packs, target)
    for _ in range(steps):
        if state.is_done():
            break
        packs = Packs.of(state)
        heavy, light = packs.at(slice(0, 1)), packs.at(slice(num_packs - partners, None))
        meetings = Meetings.of(heavy, light, pairs)
        best = torch.zeros(len(packs.order), 1, dtype=torch.int64, device="cpu")
        if partners > 1:
            best = (light.loads + meetings.least()).argmin(1, keepdim=True)
            meetings = meetings.choose(best)
        left, i, j = meetings.exchanges()  # [rows, 1]
        gains = (heavy.loads > state.target) & (left < heavy.loads - light.loads.gather(1, best))
        partner = light.order.gather(1, best)
        state.swap(gains.expand(-1, 2), heavy.order, pairs[:, i[:, 0]].T, partner, pairs[:, j[:, 0]].T)
        state.keep(gains[:, 0])
    return state.finish()
