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

from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_reference.fixed import LOAD_BITS, PENALTY

PACKS_PER_PROPOSER = 8  # from 32 packs up a match round repairs a share of them, not a number
IN_CACHE = 1 << 16  # candidates valued at once: 256 KiB; a tenth faster than all, and packs of thousands fit memory


@dataclass
class _State:
    """What is where: a cell per row and place, pack * S + slot; the cell behind a row's last takes what is not to be
    written."""

    cells: Tensor  # [3, rows * (n + 1)] int32: load, label and index of the item there
    holds: Tensor  # [rows * num_packs * n] int16, how many items of each label each pack holds
    num_packs: int
    capacity: int

    @classmethod
    def start(cls, loads: Tensor, labels: Tensor, pack: Tensor, slot: Tensor, num_packs: int) -> _State:
        rows, num_items = loads.shape
        place = pack * (num_items // num_packs) + slot
        index = torch.arange(num_items, dtype=torch.int32).expand_as(loads)
        cells = loads.new_zeros(3, rows, num_items + 1)
        cells.scatter_(2, place.expand(3, -1, -1), torch.stack((loads, labels.to(torch.int32), index)))
        holds = torch.zeros(rows, num_packs * num_items, dtype=torch.int16)
        holds.scatter_add_(1, pack * num_items + labels, torch.ones_like(pack, dtype=torch.int16))
        return cls(cells.flatten(1), holds.flatten(), num_packs, num_items // num_packs)

    @property
    def num_items(self) -> int:
        return self.num_packs * self.capacity

    def swap(self, rows: Tensor, apply: Tensor, at_i: Tensor, at_j: Tensor) -> None:
        """Exchange what is at places `at_i` and `at_j` [rows, swaps], all different, of `rows` where `apply`."""
        first = (rows * (self.num_items + 1)).unsqueeze(1)
        at = torch.stack((at_i, at_j))  # [2, rows, swaps]
        cells = self.cells[:, first + at]
        pack = (rows * self.num_packs).unsqueeze(1) + at // self.capacity
        change = apply.to(torch.int16).expand_as(at).flatten()
        for label, sign in ((cells[1], -1), (cells[1].flip(0), 1)):
            self.holds.index_add_(0, (pack * self.num_items + label).flatten(), change, alpha=sign)
        self.cells[:, first + torch.where(apply, at, self.num_items)] = cells.flip(1)

    def finish(self) -> tuple[Tensor, Tensor]:
        items = self.cells[2].view(-1, self.num_items + 1)[:, :-1].to(torch.int64)
        place = torch.empty_like(items).scatter_(1, items, torch.arange(self.num_items).expand_as(items))
        return place // self.capacity, place % self.capacity


@dataclass
class _Packs:
    """Packs of some rows in position order, the last dimension. Items come first: broadcasts then run along rows and
    packs, which is 5 times faster."""

    order: Tensor  # [rows, m] int64, pack number at each position
    holds: Tensor  # [rows, m] int64, where `_State.holds` of the pack begins
    loads: Tensor  # [rows, m] int32, descending
    item_loads: Tensor  # [S, rows, m] int32
    labels: Tensor  # [S, rows, m] int32

    @classmethod
    def above(cls, state: _State, rows: Tensor, target: Tensor) -> tuple[Tensor, _Packs]:
        """Those of `rows` that are not done, and their packs."""
        capacity = state.capacity
        loads = state.cells[0].view(-1, state.num_items + 1)[rows, :-1]
        loads = loads.view(-1, state.num_packs, capacity).sum(2, dtype=torch.int32)
        busy = loads.amax(1) > target[rows, 0]
        rows, loads = rows[busy], loads[busy]
        order = loads.argsort(dim=1, descending=True, stable=True)
        place = (rows * (state.num_items + 1)).unsqueeze(1) + order * capacity
        cells = state.cells[:2, place + torch.arange(capacity).view(-1, 1, 1)]
        holds = (rows.unsqueeze(1) * state.num_packs + order) * state.num_items
        return rows, cls(order, holds, loads.gather(1, order), cells[0], cells[1])

    def at(self, positions: Tensor | slice, face: int | None = None) -> _Packs:
        """The packs at `positions`; where a row's packs meet crosswise, `face` is the dimension of the other side."""
        everything = (self.order, self.holds, self.loads, self.item_loads, self.labels)
        picked = (values[..., positions] for values in everything)
        return _Packs(*(values if face is None else values.unsqueeze(face) for values in picked))


@dataclass
class _Meetings:
    """What the packs of each meeting could exchange, in load: items (or pairs of them) first, then rows, then meetings.

    A tensor of one side has size 1 where the other side varies. A banned item is too heavy to stay or to come.
    """

    stays_i: Tensor  # [items, rows, ...] int32, the heavy pack's load without item i
    comes_i: Tensor  # the load of i
    stays_j: Tensor  # the light pack's load without item j
    comes_j: Tensor

    @classmethod
    def of(cls, state: _State, heavy: _Packs, light: _Packs, pairs: Tensor | None = None) -> _Meetings:
        """Meetings of `heavy` with `light` packs that exchange items, or `pairs` [2, pairs] of them."""
        gives = (heavy.item_loads, light.item_loads)
        banned = (state.holds.take(light.holds + heavy.labels) > 0, state.holds.take(heavy.holds + light.labels) > 0)
        if pairs is not None:
            gives = (gives[0][pairs[0]] + gives[0][pairs[1]], gives[1][pairs[0]] + gives[1][pairs[1]])
            banned = (banned[0][pairs[0]] | banned[0][pairs[1]], banned[1][pairs[0]] | banned[1][pairs[1]])
        penalty_i, penalty_j = (side.to(torch.int32) << LOAD_BITS for side in banned)
        return cls((heavy.loads - gives[0]) + penalty_i, gives[0], light.loads - gives[1], gives[1] + penalty_j)

    def values(self) -> Tensor:
        """[rows, ...] int32: value of the best exchange of each meeting; above every load where all are banned."""
        least = torch.full_like(self.stays_i[0], 2 * PENALTY)
        chunk = max(1, IN_CACHE // max(1, self.stays_i.numel()))
        for start in range(0, len(self.stays_i), chunk):
            some = slice(start, start + chunk)
            worse = self.stays_i[some].unsqueeze(1) + self.comes_j
            torch.maximum(worse, self.comes_i[some].unsqueeze(1) + self.stays_j, out=worse)
            torch.minimum(least, worse.amin((0, 1)), out=least)
        return least

    def choose(self, chosen: Tensor) -> _Meetings:
        """One meeting of the last dimension: `chosen` [rows, ..., 1] is an index into it."""

        def at_chosen(side: Tensor) -> Tensor:
            if side.shape[-1] == 1:
                return side
            side = side.expand(-1, *chosen.shape[:-1], -1)
            return side.gather(-1, chosen.expand(len(side), *chosen.shape))

        return _Meetings(*map(at_chosen, (self.stays_i, self.comes_i, self.stays_j, self.comes_j)))

    def exchanges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Best exchange of each meeting: its value, its items i and j. Ties: lowest i, then lowest j."""
        worse = self.stays_i.unsqueeze(1) + self.comes_j
        worse = torch.maximum(worse, self.comes_i.unsqueeze(1) + self.stays_j).flatten(0, 1)
        worse = worse.movedim(0, -1).contiguous()  # argmin is 20 times slower over a stride
        best = worse.argmin(-1, keepdim=True)
        i_j = best.squeeze(-1)
        return worse.gather(-1, best).squeeze(-1), i_j // len(self.stays_i), i_j % len(self.stays_i)


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
    state = _State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    for r in range(rounds):
        rows, packs = _Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy = packs.at(slice(0, half))
        light = packs.at(num_packs - 1 - (torch.arange(half) + r) % half)
        value, i, j = _Meetings.of(state, heavy, light).exchanges()
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
    any pack behind it; the heaviest go first, and no pack takes part in two. A row stops at its target or when its
    heaviest pack has no proposal. There are `proposers` of them, or an eighth of all packs if that is more, but at most
    half.

    Ties: the heavier partner, then the lowest slot of the proposer, then of the partner.
    """
    proposers = min(max(proposers, num_packs // PACKS_PER_PROPOSER), num_packs // 2)
    capacity = loads.shape[1] // num_packs
    if proposers == 0 or capacity == 1:
        return pack, slot
    state = _State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    before = torch.arange(1, num_packs) <= torch.arange(proposers).unsqueeze(1)
    for _ in range(rounds):
        rows, packs = _Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy = packs.at(slice(0, proposers), face=-1)
        meetings = _Meetings.of(state, heavy, packs.at(slice(1, None), face=-2))
        best = meetings.values().masked_fill_(before, PENALTY).argmin(2, keepdim=True)  # [rows, proposers, 1]
        value, i, j = (found.squeeze(2) for found in meetings.choose(best).exchanges())
        partner = best.squeeze(2) + 1
        heavy_loads = packs.loads[:, :proposers]
        granted = _grant((value < heavy_loads) & (heavy_loads > target[rows]), partner)
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
    state = _State.start(loads, labels, pack, slot, num_packs)
    rows = torch.arange(loads.shape[0])
    for _ in range(steps):
        rows, packs = _Packs.above(state, rows, target)
        if len(rows) == 0:
            break
        heavy, light = packs.at(slice(0, 1)), packs.at(slice(num_packs - partners, None))
        meetings = _Meetings.of(state, heavy, light, pairs)
        best = meetings.values().argmin(1, keepdim=True)
        value, i, j = meetings.choose(best).exchanges()  # [rows, 1]
        gains = value < heavy.loads
        at_i = heavy.order * capacity + pairs[:, i[:, 0]].T
        at_j = light.order.gather(1, best) * capacity + pairs[:, j[:, 0]].T
        state.swap(rows, gains.expand(-1, 2), at_i, at_j)
        rows = rows[gains[:, 0]]
    return state.finish()
