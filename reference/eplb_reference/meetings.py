"""The state of an exchange: what is in each pack, packs in position order, and what two that meet could exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_reference.fixed import LOAD_BITS, PENALTY

IN_CACHE = 1 << 16  # candidates valued at once: 256 KiB; a tenth faster than all, and packs of thousands fit memory


@dataclass
class State:
    """What is where: a cell per row and place, pack * S + slot; the cell behind a row's last takes what is not to be
    written."""

    cells: Tensor  # [3, rows * (n + 1)] int32: load, label and index of the item there
    holds: Tensor  # [rows * num_packs * n] int16, how many items of each label each pack holds
    num_packs: int
    capacity: int

    @classmethod
    def start(cls, loads: Tensor, labels: Tensor, pack: Tensor, slot: Tensor, num_packs: int) -> State:
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
class Packs:
    """Packs of some rows in position order, the last dimension. Items come first: broadcasts then run along rows and
    packs, which is 5 times faster."""

    order: Tensor  # [rows, m] int64, pack number at each position
    holds: Tensor  # [rows, m] int64, where `State.holds` of the pack begins
    loads: Tensor  # [rows, m] int32, descending
    item_loads: Tensor  # [S, rows, m] int32
    labels: Tensor  # [S, rows, m] int32

    @classmethod
    def above(cls, state: State, rows: Tensor, target: Tensor) -> tuple[Tensor, Packs]:
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

    def at(self, positions: Tensor | slice, face: int | None = None) -> Packs:
        """The packs at `positions`; where a row's packs meet crosswise, `face` is the dimension of the other side."""
        everything = (self.order, self.holds, self.loads, self.item_loads, self.labels)
        picked = (values[..., positions] for values in everything)
        return Packs(*(values if face is None else values.unsqueeze(face) for values in picked))


@dataclass
class Meetings:
    """What the packs of each meeting could exchange, in load: items (or pairs of them) first, then rows, then meetings.

    A tensor of one side has size 1 where the other side varies. A banned item is too heavy to stay or to come.
    """

    stays_i: Tensor  # [items, rows, ...] int32, the heavy pack's load without item i
    comes_i: Tensor  # the load of i
    stays_j: Tensor  # the light pack's load without item j
    comes_j: Tensor

    @classmethod
    def of(cls, state: State, heavy: Packs, light: Packs, pairs: Tensor | None = None) -> Meetings:
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

    def choose(self, chosen: Tensor) -> Meetings:
        """One meeting of the last dimension: `chosen` [rows, ..., 1] is an index into it."""

        def at_chosen(side: Tensor) -> Tensor:
            if side.shape[-1] == 1:
                return side
            side = side.expand(-1, *chosen.shape[:-1], -1)
            return side.gather(-1, chosen.expand(len(side), *chosen.shape))

        return Meetings(*map(at_chosen, (self.stays_i, self.comes_i, self.stays_j, self.comes_j)))

    def exchanges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Best exchange of each meeting: its value, its items i and j. Ties: lowest i, then lowest j."""
        worse = self.stays_i.unsqueeze(1) + self.comes_j
        worse = torch.maximum(worse, self.comes_i.unsqueeze(1) + self.stays_j).flatten(0, 1)
        worse = worse.movedim(0, -1).contiguous()  # argmin is 20 times slower over a stride
        best = worse.argmin(-1, keepdim=True)
        i_j = best.squeeze(-1)
        return worse.gather(-1, best).squeeze(-1), i_j // len(self.stays_i), i_j % len(self.stays_i)
