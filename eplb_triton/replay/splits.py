"""How the tokens of a step are split among the replicas of their expert, and what that puts on the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from eplb_triton.placement import Placement

EVEN = "even"
LAST_STEPS = "last steps"
IN_STEP = "in the step"
SPLITS = (EVEN, LAST_STEPS, IN_STEP)
"""Evenly; by a table that was made from the last steps; by the counts of the step itself."""

TABLE_STEPS = 16
"""Steps that a table is made from, and steps that it then serves."""
TABLE_WIDTH = 16
MOST_TOKENS = 2**31


class HasSums(Protocol):
    """What tables are made from."""

    def sum_of(self, most: int) -> Tensor:
        """[L, E] float64, the loads of the newest `most` steps together."""


class Splitter:
    """GPU loads of a deployment's steps by every split that is asked for.

    Args:
        names: of `SPLITS`, `EVEN` first.

    Raises:
        ValueError: an unknown name, or not `EVEN` first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names or names[0] != EVEN or not set(names) <= set(SPLITS):
            raise ValueError(f"splits={tuple(names)} must be {EVEN!r}, then any of {SPLITS[1:]}")
        self._names = tuple(names)
        self._shares: Tensor | None = None  # [L, P] float64, of its expert's tokens that a slot gets by the table
        self._age = 0

    def gpu_loads(self, loads: Tensor, live: Placement) -> dict[str, Tensor]:
        """[L, D] float64 of each split, of one step's `loads` [L, E]: tokens, or where they are no whole numbers units
        of a power of two a layer."""
        found = {EVEN: live.gpu_loads(loads)}
        if LAST_STEPS in self._names:
            found[LAST_STEPS] = found[EVEN] if self._shares is None else _by_shares(loads, live, self._shares)
        if IN_STEP in self._names:
            whole = loads.is_floating_point() or int(loads.sum(1).max()) < MOST_TOKENS
            quotas = live.split(loads if whole else loads.double())
            found[IN_STEP] = _on_gpus(quotas, live).double()
        return found

    def after_step(self, live: Placement, history: HasSums, changed: Sequence[int] = ()) -> None:
        """Make the table anew: all of it every `TABLE_STEPS` steps, else that of the layers that have just changed."""
        if LAST_STEPS not in self._names:
            return
        self._age += 1
        if self._age >= TABLE_STEPS:
            self._age, layers = 0, list(range(live.num_layers))
        elif self._shares is None or not changed:
            return
        else:
            layers = list(changed)
        if self._shares is None:
            self._shares = torch.empty(live.phy2log.shape, dtype=torch.float64, device="cpu")
        recent = history.sum_of(TABLE_STEPS)
        part = live
        if len(layers) < live.num_layers:
            part = Placement.from_phy2log(live.phy2log[layers], live.num_experts, live.topology, live.policy)
        table = part.table(part.split(recent[layers]), TABLE_WIDTH)  # [layers, E, width], slots
        shares = torch.zeros(part.phy2log.shape, dtype=torch.float64, device="cpu")
        slots = table.flatten(1).long()
        each = torch.full(slots.shape, 1 / TABLE_WIDTH, dtype=torch.float64, device="cpu")
        self._shares[layers] = shares.scatter_add_(1, slots, each)


def _by_shares(loads: Tensor, live: Placement, shares: Tensor) -> Tensor:
    return _on_gpus(loads.double().gather(1, live.phy2log.long()) * shares, live)


def _on_gpus(of_slots: Tensor, live: Placement) -> Tensor:
    """[L, D], sums of [L, P]."""
    return of_slots.view(len(of_slots), live.topology.num_gpus, -1).sum(2)
