"""Logical maps whose entries repeat in proportion to shares, for a dispatch that takes any entry with equal chance."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from eplb_triton.integrations.logical_maps import TABLE_WIDTH
from eplb_triton.topology import Topology

MOST_ROWS = 1024
"""Layers that are remembered: of two models and two plans of each."""


class WeightedMaps:
    """Remembers which loads the layers of the last plans were made for, by their slots; bounded. Any thread may use it.

    A framework asks for the maps of one layer without saying which: layers of a model of equal slots share their loads.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[int, bytes], tuple[Tensor, Topology]] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Compile what the CPU needs, so that the first commit of a map does not."""
        slots, topology = torch.tensor([[0, 1]]), Topology(num_replicas=2, num_gpus=2)
        self.remember(slots, torch.ones(1, 2), topology)
        self.maps(slots, 2)

    def remember(self, phy2log: Tensor, loads: Tensor, topology: Topology, model: object | None = None) -> None:
        """Keep the loads [L, E] of every layer of phy2log [L, P] of a model, in force from now on."""
        usable = loads.to("cpu", torch.float32)
        usable = torch.where((usable >= 0) & (usable <= 2.0**100), usable, 0.0)
        found: dict[tuple[int, bytes], Tensor] = {}
        for slots, load in zip(phy2log, usable, strict=True):
            key = _key(slots, model)
            found[key] = found[key] + load if key in found else load
        with self._lock:
            for key, load in found.items():
                self._rows[key] = load, topology
                self._rows.move_to_end(key)
            while len(self._rows) > MOST_ROWS:
                self._rows.popitem(last=False)

    def maps(self, phy2log: Tensor, num_experts: int, model: object | None = None) -> tuple[Tensor, Tensor] | None:
        """As `maps_of_slots`, of width 16 or more; None where a layer is not remembered, or lacks an expert."""
        from eplb_triton.serving.dispatch import classify, split, table  # noqa: PLC0415 - only who asks for it

        slots = phy2log if phy2log.dim() == 2 else phy2log.unsqueeze(0)
        with self._lock:
            found = [self._rows.get(_key(row, model)) for row in slots]
        known = [row for row in found if row is not None and row[0].numel() == num_experts]
        if len(known) < len(found) or not known or bool((slots < 0).any()):
            return None
        topology = known[0][1]
        loads = torch.stack([load for load, _ in known])
        slots = slots.contiguous()
        most = int(max(torch.bincount(row, minlength=num_experts).max() for row in slots))
        quotas = split(loads, slots, classify(slots, num_experts, topology), topology)
        width = max(TABLE_WIDTH, most)
        made = table(quotas, width, slots, num_experts, topology)
        count = torch.where(made[..., 0] >= 0, width, 0).to(slots.dtype)
        return (made, count) if phy2log.dim() == 2 else (made[0], count[0])


def _key(slots: Tensor, model: object | None) -> tuple[int, bytes]:
    return id(model), slots.to("cpu", torch.int64).contiguous().numpy().tobytes()
