"""The state of an exchange: what is in each pack, packs in position order, and what two that meet could exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_reference.arith import indices
from eplb_triton.constants import PENALTY

BANNED = 3 * PENALTY  # so much more is left by an exchange of what must stay: above the load of a pack in any case
IN_CACHE = 1 << 20  # candidates valued at once: 4 MiB; twice as fast as item by item, and packs of thousands fit memory


@dataclass
class State:
    """What is where in the rows that are not done. Slots come first: sums and broadcasts then run along rows and
    packs, which is 5 times faster."""

    cells: Tensor  # [3, S, rows, m] int32: load, label and index in `pack` of the item at a slot of a pack
    target: Tensor  # [rows, 1] int32
    pack: Tensor  # [rows of the call, n] int64, the result: true of the rows that are done
    slot: Tensor

    @classmethod
    def start(cls, loads: Tensor, labels: Tensor, pack: Tensor, slot: Tensor, num_packs: int, target: Tensor) -> State:
        """The rows above their target; the others stay as they are."""
        pack_loads = loads.new_zeros(len(loads), num_packs).scatter_add_(1, pack, loads)
        rows = (pack_loads.amax(1, keepdim=True) > target).nonzero()[:, 0]
        place = slot.index_select(0, rows) * num_packs + pack.index_select(0, rows)
        items = torch.empty_like(place).scatter_(1, place, indices(loads.shape[1]).expand_as(place))
        values = (
            loads.index_select(0, rows).gather(1, items),
            labels.index_select(0, rows).gather(1, items).to(torch.int32),
            (items + (rows * loads.shape[1]).unsqueeze(1)).to(torch.int32),
        )
        cells = torch.stack(values)
        cells = cells.view(3, len(rows), loads.shape[1] // num_packs, num_packs).transpose(1, 2).contiguous()
        return cls(
            cells, target[rows], *(values.clone(memory_format=torch.contiguous_format) for values in (pack, slot))
        )

    def is_done(self) -> bool:
        return len(self.target) == 0

    def swap(self, apply: Tensor, pack_i: Tensor, i: Tensor, pack_j: Tensor, j: Tensor) -> None:
        """Exchange the items in slots `i` of `pack_i` and `j` of `pack_j` [rows, swaps], all different, where `apply`.
        Packs are numbered as in `Packs.order`."""
        all_packs = self.cells[0, 0].numel()
        at = torch.stack((i * all_packs + pack_i, j * all_packs + pack_j)).flatten(1)
        at = at.index_select(1, apply.flatten().nonzero()[:, 0])  # half the time of at[:, apply], and so below
        cells = self.cells.view(3, -1)
        cells.index_copy_(1, at.flatten(), cells.index_select(1, at.flip(0).flatten()))

    def keep(self, going: Tensor) -> None:
        """Put aside the rows that are not `going` [rows], once they are many: nothing more is done to them, with them
        or without."""
        if 2 * int(going.count_nonzero()) <= len(going):
            self._write(self.cells[2][:, ~going])
            rows = going.nonzero()[:, 0]
            self.cells, self.target = self.cells.index_select(2, rows), self.target.index_select(0, rows)

    def finish(self) -> tuple[Tensor, Tensor]:
        self._write(self.cells[2])
        return self.pack, self.slot

    def _write(self, items: Tensor) -> None:
        """Write to the result where `items` [S, rows, m] are."""
        slots, _, packs = items.shape
        at = items.flatten().to(torch.int64)
        self.pack.view(-1).scatter_(0, at, indices(packs).expand_as(items).flatten())
        self.slot.view(-1).scatter_(0, at, indices(slots).view(-1, 1, 1).expand_as(items).flatten())


@dataclass
class Packs:
    """Packs of all rows in position order, the last dimension."""

    order: Tensor  # [rows, m] int64, row * m + pack number at each position
    loads: Tensor  # [rows, m] int32, descending
    item_loads: Tensor  # [S, rows, m] int32
    labels: Tensor  # [S, rows, m] int16 if all of them fit, which is twice as fast, else int32

    @classmethod
    def of(cls, state: State) -> Packs:
        capacity, rows, num_packs = state.cells.shape[1:]
        loads = state.cells[0].sum(0, dtype=torch.int32)
        loads, order = loads.sort(dim=1, descending=True, stable=True)
        item_loads, labels = state.cells[:2].gather(3, order.expand(2, capacity, -1, -1))
        order += (indices(rows) * num_packs).unsqueeze(1)
        narrow = capacity * num_packs <= torch.iinfo(torch.int16).max
        return cls(order, loads, item_loads, labels.to(torch.int16) if narrow else labels)

    def at(self, positions: Tensor | slice, face: int | None = None) -> Packs:
        """The packs at `positions`; where a row's packs meet crosswise, `face` is the dimension of the other side."""
        picked = (values[..., positions] for values in vars(self).values())
        return Packs(*(values if face is None else values.unsqueeze(face) for values in picked))


@dataclass
class Meetings:
    """What the packs of each meeting could exchange: items (or pairs of them) first, then rows, then meetings.

    Of the difference H - K between two packs an exchange of a for b leaves |(H - K) - 2a + 2b|. The heavier one then
    weighs half of H + K + what is left: an exchange gains if it leaves less than H - K, and the best leaves least.
    Where an item is banned BANNED more is left, or twice that: in all less than 2**31, as |(H - K) - 2a + 2b| <= H + K.
    """

    gives: Tensor  # [items, rows, ...] int32: 2a - (H - K), for each item of the heavy pack; banned: + BANNED
    comes: Tensor  # 2b, for each item of the light one; banned: - BANNED

    @classmethod
    def of(cls, heavy: Packs, light: Packs, pairs: Tensor | None = None) -> Meetings:
        """Meetings of `heavy` with `light` packs that exchange items, or `pairs` [2, pairs] of them."""
        difference = heavy.loads - light.loads
        free_i, free_j = _free(*(side.labels.expand(-1, *difference.shape).contiguous() for side in (heavy, light)))
        a, b = heavy.item_loads, light.item_loads
        if pairs is not None:
            a, b, free_i, free_j = (_both(values, pairs) for values in (a, b, free_i, free_j))
            free_i, free_j = free_i >> 1, free_j >> 1
        gives = 2 * a - (difference - BANNED)
        return cls(gives.sub_(free_i, alpha=BANNED), torch.add(2 * b - BANNED, free_j, alpha=BANNED))

    def least(self) -> Tensor:
        """[rows, ...] int32: what the best exchange of each meeting leaves."""
        least = torch.full_like(self.gives[0], BANNED)
        for some in _chunks(self.gives):
            torch.minimum(least, (some.unsqueeze(1) - self.comes).abs_().amin((0, 1)), out=least)
        return least

    def choose(self, chosen: Tensor) -> Meetings:
        """One meeting of the last dimension: `chosen` [rows, ..., 1] is an index into it."""
        return Meetings(*(side.gather(-1, chosen.expand(len(side), *chosen.shape)) for side in vars(self).values()))

    def exchanges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Best exchange of each meeting: what it leaves, its items i and j. Ties: lowest i, then lowest j."""
        left, i = (self.gives.unsqueeze(1) - self.comes).abs_().amin(1).min(0)  # 5 times faster than min of all
        return left, i, (self.gives.gather(0, i.unsqueeze(0)) - self.comes).abs_().min(0).indices


def _free(labels_i: Tensor, labels_j: Tensor) -> tuple[Tensor, Tensor]:
    """Of each item of one pack and of the other [items, rows, ...], 0 if the other pack holds its label, else 1."""
    free_i, free_j = [], torch.ones_like(labels_j)
    for some in _chunks(labels_i):
        difference = some.unsqueeze(1) ^ labels_j  # 0 where equal, else above; == takes 8 times as long
        free_i.append(difference.amin(1).clamp_(max=1))
        torch.minimum(free_j, difference.amin(0), out=free_j)
    return torch.cat(free_i), free_j


def _both(values: Tensor, pairs: Tensor) -> Tensor:
    """Sums of the `pairs` [2, pairs] of `values` [items, ...]."""
    return values.index_select(0, pairs[0]) + values.index_select(0, pairs[1])


def _chunks(side: Tensor) -> list[Tensor]:
    """Items of one side, as many at once as make about `IN_CACHE` candidates with all of the other."""
    size = max(1, IN_CACHE // side.numel())
    return [side[start : start + size] for start in range(0, len(side), size)]
