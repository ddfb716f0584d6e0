"""The last windows of loads, where a framework hands over one sum at a time."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from typing import NamedTuple

import torch
from torch import Tensor

Key = tuple[int, int, int]  # layers, experts, and which of the models that are equal in both


class Kept(NamedTuple):
    """The windows of one model."""

    num_replicas: int
    model: weakref.ref[object] | None
    windows: deque[Tensor]


class Windows:
    """The last windows [L, E] of each model, bounded in both; any thread may use it.

    Args:
        steps: windows of a model that are kept.
        models: models that are kept; the one used least recently goes first.
    """

    def __init__(self, steps: int = 32, models: int = 4) -> None:
        self._steps, self._models = steps, models
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, loads: Tensor, num_replicas: int, model: object | None = None) -> Tensor:
        """[n, L, E], the windows of a model, oldest first, `loads` the last; all-zero ones are not kept.

        Another number of replicas drops what there was: ranks have joined or left, and those that joined know nothing
        of it.

        Args:
            loads: [L, E].
            num_replicas: P.
            model: any object that stays the same while the model is served, referred to weakly; None where nobody says
                which model it is: those of equal L and E share their windows then.
        """
        num_layers, num_experts = loads.shape
        key = _key(num_layers, num_experts, model)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.num_replicas != num_replicas or (kept.model and kept.model()) is not model:
                reference = None if model is None else weakref.ref(model)
                kept = self._kept[key] = Kept(num_replicas, reference, deque(maxlen=self._steps))
            self._kept.move_to_end(key)
            while len(self._kept) > self._models:
                self._kept.popitem(last=False)
            if bool(loads.any()):
                kept.windows.append(loads.clone())
            return torch.stack(tuple(kept.windows)) if kept.windows else loads.unsqueeze(0)

    def forget(self, num_layers: int, num_experts: int, model: object | None = None) -> None:
        """Drop the windows of one model: every rank does so when they disagree, and starts alike."""
        with self._lock:
            self._kept.pop(_key(num_layers, num_experts, model), None)


def _key(num_layers: int, num_experts: int, model: object | None) -> Key:
    return num_layers, num_experts, 0 if model is None else id(model)
