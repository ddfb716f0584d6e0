"""Replanning: what every backend returns of it, and the numbers that callers need around it."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from eplb_triton.constants import Z_UNITS

DEFAULT_PRICE = 3e-4
"""A BF16 expert of DeepSeek-V3 over 900 GB/s, 98 us, against 2048 steps of 0.17 ms."""
LEAST_STEPS_SERVED = 1024


class Replanned(NamedTuple):
    """What replanning gives, per layer; on the device of the history."""

    phy2log: Tensor  # [L, P] int64, expert in each physical slot
    written: Tensor  # [L] int64, slots that differ from before (fills are no difference); P where nothing was
    fills: Tensor  # [L] int64, slots that held no expert before
    peak_before: Tensor  # [L] float64, predicted load of the busiest GPU / mean GPU load; NaN where nothing was
    peak_after: Tensor  # [L] float64, the same of the new placement
    status: Tensor  # [L] int32, of replan_status: 0, or why the layer was kept as it is (its peaks are NaN)


class Changes(NamedTuple):
    """What a plan changes of the placement in force, per layer, and what it is expected to gain; as `Replanned`."""

    written: Tensor  # [L] int64, slots that differ from before; P where nothing was
    fills: Tensor  # [L] int64, slots that held no expert before
    peak_before: Tensor  # [L] float64, predicted load of the busiest GPU / mean GPU load; NaN where nothing was
    peak_after: Tensor  # [L] float64, the same of the new placement
    status: Tensor  # [L] int32, of replan_status: 0, or why the layer was kept as it is

    @classmethod
    def empty(cls, num_layers: int, device: torch.device) -> Changes:
        """Of layers that nobody has planned yet: no change, no prediction."""
        none = [torch.zeros(num_layers, dtype=torch.int64, device=device) for _ in range(2)]
        peaks = [torch.full((num_layers,), math.nan, dtype=torch.float64, device=device) for _ in range(2)]
        return cls(none[0], none[1], peaks[0], peaks[1], torch.zeros(num_layers, dtype=torch.int32, device=device))


def score_z(num_gpus: int, z: float | None = None) -> float:
    """Standard deviations above the mean that a GPU's score counts, in units of 1 / 65536.

    Args:
        num_gpus: D; by default z is what the largest of D normal variables exceeds with probability 1 / D.
        z: instead of that.

    Ties: half to even.
    """
    if z is None:
        z = NormalDist().inv_cdf(1 - 1 / num_gpus) if num_gpus > 1 else 0.0
    return round(Z_UNITS * z) / Z_UNITS


def replan_price(slot_bytes: float, bandwidth: float, layer_seconds: float, interval: int) -> float:
    """What one written slot must save for a move to pay: its transfer in units of balanced work.

    A plan is taken to serve max(1024, 2 * interval) steps.

    Args:
        slot_bytes: weights of one expert, bytes.
        bandwidth: of their transfer, bytes a second.
        layer_seconds: the part of one step of one layer that is proportional to the load of its busiest GPU, were all
            loads equal; seconds.
        interval: steps between two plans.

    Raises:
        ValueError: an argument that is not above 0 and finite; `slot_bytes` may be 0.
    """
    for name, value in {"bandwidth": bandwidth, "layer_seconds": layer_seconds, "interval": interval}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be above 0 and finite")
    if not 0 <= slot_bytes < math.inf:
        raise ValueError(f"slot_bytes={slot_bytes!r} must be at least 0 and finite")
    return (slot_bytes / bandwidth) / (layer_seconds * max(LEAST_STEPS_SERVED, 2 * interval))


def deployment_order(changes: Changes) -> Tensor:
    """The layers worth deploying, by how far their predicted peak falls, largest first.

    Layers where nothing was before come first of all: they serve nothing until then. Layers whose slots were only
    filled come last; layers without a change or a fill are left out. Nothing waits for the device.

    Returns:
        [L] int64: numbers of layers, then -1.

    Ties: the lowest layer.
    """
    written, fills, peak_before, peak_after, _ = changes
    fall = torch.where(peak_before.isnan(), torch.inf, peak_before - peak_after)
    fall = torch.where(written > 0, fall, -torch.inf)
    by_fall = fall.argsort(descending=True, stable=True)
    # A layer with fills alone and one that is as it was both have -inf; a second stable sort puts the latter last.
    kept = ((written == 0) & (fills == 0)).to(torch.int8)
    order = by_fall[kept[by_fall].argsort(stable=True)]
    return torch.where(kept[order] == 0, order, -1)
