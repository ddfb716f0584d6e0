"""How far plans are from the lower bound."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eplb_triton import Placement, Topology, lower_bound
from eplb_triton.cli.terminal import progress

GAP = "gap = max GPU load / lower bound - 1; no plan gets the busiest GPU of a layer below its lower bound"


def lower_bounds(windows: Iterable[Tensor], num_layers: int, topology: Topology, pairing: bool) -> list[Tensor]:
    """The lower bound [L] float64 of every window [L, E], computed once for all plans that are judged by it.

    Args:
        windows: loads.
        num_layers: layers of all windows together, which the progress bar counts.
        topology: what is planned for.
        pairing: as in `lower_bound`.
    """
    if not (pairing and topology.slots_per_gpu == 2):
        return [lower_bound(weight, topology, pairing=False) for weight in windows]
    bounds = []
    with progress("lower bound", num_layers) as advance:  # the linear programs take half a second a layer
        for weight in windows:
            layers = []
            for layer in range(len(weight)):
                layers.append(lower_bound(weight[layer : layer + 1], topology))
                advance()
            bounds.append(torch.cat(layers))
    return bounds


def gaps_of(placement: Placement, weight: Tensor, bound: Tensor) -> Tensor:
    """[L] float64, gap of each layer, as `Placement.gap`; 0 for one without load."""
    return torch.where(bound > 0, placement.gpu_loads(weight).amax(1) / bound - 1, 0.0)


def percent(gap: float | Tensor) -> str:
    """A gap in %, to 0.001: `0.017`. One that is below 0 by a rounding error is 0, not -0."""
    return f"{round(100 * float(gap), 3) + 0.0:,.3f}"
