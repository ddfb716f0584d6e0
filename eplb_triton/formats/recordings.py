"""Recordings: what a serving engine wrote down, asked for its loads window by window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eplb_triton.constants import NEWEST_STEPS
from eplb_triton.formats.arrays import Array

# Ids counted at once: bincount needs them as int64, 32 MiB here, however long the trace is.
_IDS_AT_ONCE = 1 << 22

STEP_TOKENS = 128
"""Consecutive tokens of a trace that are taken for a step of an engine, or a few more where it does not divide."""


@dataclass(frozen=True, eq=False)
class Recording(ABC):
    """Loads over time.

    Args:
        path: the file they came from.
        num_layers: L.
        num_experts: E.
        notes: what a user should know about how the file was read, one sentence each.
    """

    path: Path
    num_layers: int
    num_experts: int
    notes: tuple[str, ...] = field(kw_only=True, default=())

    @property
    @abstractmethod
    def length(self) -> int:
        """T, the number of steps or tokens."""

    @property
    @abstractmethod
    def unit(self) -> Literal["step", "token"]:
        """What a window is counted in."""

    @property
    @abstractmethod
    def default_window(self) -> int:
        """Steps or tokens of a window where the user says nothing."""

    @abstractmethod
    def loads(self, start: int, stop: int) -> torch.Tensor:
        """[L, E] float64: the load of steps or tokens start..stop-1, summed (start < stop <= length)."""

    @abstractmethod
    def steps_of(self, start: int, stop: int) -> torch.Tensor:
        """[n, L, E] float64: the loads of start..stop-1 step by step, the newest `NEWEST_STEPS` of them at most."""


@dataclass(frozen=True, eq=False)
class LoadSeries(Recording):
    """Loads of every expert at every step.

    Args:
        steps: [T, L, E] integer or float, tokens per expert.
    """

    steps: Array = field(kw_only=True)
    unit = "step"
    default_window = 1

    @property
    def length(self) -> int:
        return len(self.steps)

    def loads(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.steps[start:stop].sum(axis=0, dtype=np.float64))

    def steps_of(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.steps[max(start, stop - NEWEST_STEPS) : stop].astype(np.float64))


@dataclass(frozen=True, eq=False)
class RoutingTrace(Recording):
    """The experts each token was sent to. The load of an expert is how often it occurs.

    Args:
        topk_ids: [tokens, L, k] integer in -1..E-1; -1 marks padding and counts for no expert.
    """

    topk_ids: Array = field(kw_only=True)
    unit = "token"
    default_window = 16 * STEP_TOKENS

    @property
    def length(self) -> int:
        return len(self.topk_ids)

    def loads(self, start: int, stop: int) -> torch.Tensor:
        layers, experts = self.num_layers, self.num_experts
        # One bincount over layer * (E + 1) + id + 1: column 0 of each layer collects the padding.
        first = np.arange(layers, dtype=np.int64)[:, None] * (experts + 1) + 1  # [L, 1]
        counts = np.zeros(layers * (experts + 1), dtype=np.int64)
        stride = max(1, _IDS_AT_ONCE // self.topk_ids[0].size)
        for token in range(start, stop, stride):
            ids = self.topk_ids[token : min(token + stride, stop)].astype(np.int64)
            counts += np.bincount((ids + first).ravel(), minlength=len(counts))
        return torch.from_numpy(counts.reshape(layers, experts + 1)[:, 1:].astype(np.float64))

    def steps_of(self, start: int, stop: int) -> torch.Tensor:
        count = max(1, (stop - start) // STEP_TOKENS)  # what is left over is spread: no step is nearly empty
        edges = [start + index * (stop - start) // count for index in range(count + 1)][-NEWEST_STEPS - 1 :]
        return torch.stack([self.loads(first, last) for first, last in pairwise(edges)])
