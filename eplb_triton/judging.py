"""What a placement is worth under given loads: loads of GPUs, balancedness, distance to the bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eplb_triton.bound import lower_bound
from eplb_triton.loads import check_judged
from eplb_triton.placement_rules import need_every_expert

if TYPE_CHECKING:
    from eplb_triton.placement import Placement

BALANCEDNESS = "balancedness = mean GPU load summed over layers / max GPU load summed over layers"


def gpu_loads(placement: Placement, loads: Tensor) -> Tensor:
    """[L, D] float64: see `Placement.gpu_loads`."""
    check_judged(loads, tuple(placement.logcnt.shape))
    need_every_expert(placement, "loads of GPUs")
    topology = placement.topology
    each = loads.detach().to(placement.logcnt.device, torch.float64) / placement.logcnt
    slots = each.gather(1, placement.phy2log.long())
    return slots.view(placement.num_layers, topology.num_gpus, topology.slots_per_gpu).sum(2)


def balancedness(placement: Placement, loads: Tensor, *, per_layer: bool) -> float | Tensor:
    """A number, or [L] float64: see `Placement.balancedness`."""
    on_gpus = gpu_loads(placement, loads)
    mean, peak = on_gpus.mean(1), on_gpus.amax(1)
    if per_layer:
        return torch.where(peak == 0, 1.0, mean / peak)
    return float(mean.sum() / peak.sum()) if float(peak.sum()) != 0 else 1.0


def gap(placement: Placement, loads: Tensor, *, pairing: bool) -> Tensor:
    """[L] float64 on the CPU: see `Placement.gap`."""
    peak = gpu_loads(placement, loads).amax(1).cpu()
    bound = lower_bound(loads, placement.topology, pairing=pairing)
    return torch.where(bound == 0, 0.0, peak / bound - 1)
