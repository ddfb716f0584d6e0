"""The last windows of loads, where a framework hands over one sum at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

import torch
from torch import Tensor

Signature = tuple[int, int, int]  # layers, experts, replicas


class Windows:
    """The last windows [L, E] of each model, told apart by (L, E, P); bounded in both. Any thread may use it.

    Args:
        steps: windows of a model that are kept.
        models: signatures that are kept; the one used least recently goes first.
    """

    def __init__(self, steps: int = 32, models: int = 4) -> None:
        self._steps, self._models = steps, models
        self._kept: OrderedDict[Signature, deque[Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, loads: Tensor, num_replicas: int) -> Tensor:
        """[n, L, E], the windows of this model, oldest first, `loads` the last; all-zero ones are not kept.

        A number of replicas that is new to a model of L layers and E experts drops what there was: ranks have joined
        or left, and those that joined know nothing of it.
        """
        signature = (*loads.shape, num_replicas)
        with self._lock:
            for other in [kept for kept in self._kept if kept[:2] == signature[:2] and kept != signature]:
                del self._kept[other]
            kept = self._kept.setdefault(signature, deque(maxlen=self._steps))
            self._kept.move_to_end(signature)
            while len(self._kept) > self._models:
                self._kept.popitem(last=False)
            if bool(loads.any()):
                kept.append(loads.clone())
            return torch.stack(tuple(kept)) if kept else loads.unsqueeze(0)

    def forget(self, num_layers: int, num_experts: int, num_replicas: int) -> None:
        """Drop the windows of one model: every rank does so when they disagree, and starts alike."""
        with self._lock:
            self._kept.pop((num_layers, num_experts, num_replicas), None)
