"""Steps judged, and what is kept of many of them: as much of ten as of ten million."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eplb_triton.replay.splits import EVEN

BUCKETS = 120
PARTS = 512
"""Parts of 1 by which a percentile is told: 0.002."""


class Step(NamedTuple):
    """One step, judged by the placement that was in force."""

    gpu_loads: dict[str, Tensor]  # [L, D] float64 of every split that was asked for
    written: int  # slots written after it
    planned: float  # seconds that a plan made after it took, 0 where none was

    @property
    def peak(self) -> Tensor:
        """[L] float64, load of the busiest GPU, by an even split."""
        return self.gpu_loads[EVEN].amax(1)

    @property
    def mean(self) -> Tensor:
        """[L] float64, mean GPU load."""
        return self.gpu_loads[EVEN].mean(1)


@dataclass
class Summary:
    """Steps taken together, each by an even split. Layers without load are balanced: 1."""

    steps: int = 0
    layer_steps: int = 0
    par: float = 0.0  # sum over steps and layers of peak / mean
    peak: float = 0.0
    mean: float = 0.0
    written: int = 0
    plan_seconds: list[float] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Count a step in."""
        peak, mean = step.peak, step.mean
        ratio = torch.where(mean > 0, peak / mean, 1.0)
        self.steps += 1
        self.layer_steps += len(ratio)
        self.par += float(ratio.sum())
        self.peak += float(peak.sum())
        self.mean += float(mean.sum())
        self.written += step.written
        if step.planned:
            self.plan_seconds.append(step.planned)

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Summary:
        """All of `steps`."""
        summary = cls()
        for step in steps:
            summary.add(step)
        return summary

    @property
    def peak_over_mean(self) -> float:
        """PAR: the busiest GPU's load as a multiple of the mean, averaged over steps and layers."""
        return self.par / self.layer_steps if self.layer_steps else 1.0

    @property
    def balancedness(self) -> float:
        """Per step: mean GPU load summed over steps and layers / max GPU load summed over them."""
        return self.mean / self.peak if self.peak > 0 else 1.0


class Tally:
    """What one split of one deployment did, over time and by layer, in memory that does not grow with the steps.

    Args:
        num_steps: how many there will be.
        num_layers: L.
        num_gpus: D.
        heat: whether to keep the load of every GPU of every layer over time.
        skip: steps at the beginning that only what is kept over time shows.
        buckets: parts of time that means are kept of.
    """

    def __init__(
        self,
        num_steps: int,
        num_layers: int,
        num_gpus: int,
        *,
        heat: bool = False,
        skip: int = 0,
        buckets: int = BUCKETS,
    ) -> None:
        self.buckets = max(1, min(buckets, num_steps))
        self._num_steps, self._skip = max(1, num_steps), skip
        self.steps = 0
        self.by_layer = np.zeros(num_layers)
        self._by_time = np.zeros(self.buckets)
        self._in_bucket = np.zeros(self.buckets, np.int64)
        self._ratios = np.zeros((num_gpus - 1) * PARTS + 1, np.int64)
        self._heat = np.zeros((self.buckets, num_layers, num_gpus), np.float32) if heat else None

    def add(self, gpu_loads: Tensor) -> None:
        """Count in the GPU loads [L, D] of the next step."""
        loads = gpu_loads.numpy()
        mean = loads.mean(1, keepdims=True)
        relative = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
        ratio = relative.max(1)
        at = self.bucket_of(self.steps)
        self.steps += 1
        self._by_time[at] += ratio.sum()
        self._in_bucket[at] += 1
        if self._heat is not None:
            self._heat[at] += relative
        if self.steps > self._skip:
            self.by_layer += ratio
            upper = np.ceil((ratio - 1) * PARTS - 1e-9).astype(np.int64).clip(0, len(self._ratios) - 1)
            np.add.at(self._ratios, upper, 1)

    def bucket_of(self, step: int) -> int:
        """The part of time that step number `step` (from 0) falls into."""
        return min(self.buckets - 1, step * self.buckets // self._num_steps)

    @property
    def judged(self) -> int:
        """Steps that were not skipped."""
        return max(0, self.steps - self._skip)

    @property
    def par(self) -> float:
        """Sum over steps and layers of the busiest GPU's load / the mean."""
        return float(self.by_layer.sum())

    @property
    def mean(self) -> float:
        """PAR: that, averaged over steps and layers; 1 without a step."""
        return self.par / (self.judged * len(self.by_layer)) if self.judged and len(self.by_layer) else 1.0

    @property
    def layers(self) -> NDArray[np.float64]:
        """[L], PAR of every layer."""
        return self.by_layer / max(1, self.judged)

    @property
    def over_time(self) -> NDArray[np.float64]:
        """[buckets], PAR in every part of time, NaN where there was no step."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._by_time / (self._in_bucket * len(self.by_layer))

    def percentile(self, share: float) -> float:
        """The PAR that so large a share of all steps and layers does not exceed, told upwards to 1 / `PARTS`."""
        upto = self._ratios.cumsum()
        if not upto[-1]:
            return 1.0
        return 1 + int(np.searchsorted(upto, share * upto[-1])) / PARTS

    def heat_of(self, layer: int) -> NDArray[np.float32]:
        """[D, buckets], each GPU's load / the mean of its layer, averaged over each part of time."""
        assert self._heat is not None
        heat: NDArray[np.float32] = (self._heat[:, layer] / np.maximum(self._in_bucket, 1)[:, None]).T
        return heat
