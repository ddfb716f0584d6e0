"""The rules of the serving simulation: cases, and what one planner is worth to each; `bench.studies.serving` says how.

Placements change at few steps only: those between are judged together.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.replans import replan_price
from eplb_triton.replay import Plan

BALANCED_SECONDS, SLOT_BYTES, BANDWIDTH = 60.0, 88_080_384, 900e9
STEPS, LAYERS = 6144, 6


class Case(NamedTuple):
    """Drawn traffic of a model on some GPUs; cases of a kind share its weight in the composite."""

    kind: str
    num_layers: int
    num_experts: int
    num_gpus: int

    @property
    def topology(self) -> Topology:
        """As many redundant slots as GPUs."""
        return Topology(num_replicas=self.num_experts + self.num_gpus, num_gpus=self.num_gpus)

    @property
    def start(self) -> Placement:
        """Experts in order over the GPUs; the last slot of each repeats the one before."""
        gpus, slots = self.num_gpus, self.topology.slots_per_gpu
        table = torch.arange(gpus).unsqueeze(1) * (slots - 1) + torch.arange(slots - 1)
        table = torch.cat((table, table[:, -1:]), 1).flatten() % self.num_experts
        return Placement.from_phy2log(table.repeat(LAYERS, 1), self.num_experts, self.topology)


WEIGHTS = {"R1": 3, "Mix": 1, "Qwen3": 3}
CASES = (
    *(Case("R1", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Mix", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Qwen3", 94, 128, gpus) for gpus in (32, 64, 128)),
)


def simulate(case: Case, loads: Tensor, plan: Plan, interval: int) -> dict[str, float]:
    """PAR, slots written (of all layers) and modelled seconds of one planner on one case.

    loads: [n, L, E] float32. Placements change at few steps only: those between are judged together.
    """
    live, judged, due = case.start, 0, interval + 1
    par, written, seconds = 0.0, 0, []
    while due < len(loads):
        began = time.perf_counter()
        ahead = plan(loads[:due], live)
        seconds.append(time.perf_counter() - began)
        order = ahead.deployment_order().tolist() if ahead.changes is not None else range(LAYERS)
        layers = [layer for layer in order if layer >= 0]
        for k, layer in enumerate(layers):  # the k-th stands for those that come into force up to num_layers / LAYERS
            at = due - (2 * k + 1) * case.num_layers // (-2 * LAYERS)  # steps later: their middle, rounded up
            if at > len(loads):
                break
            par, judged = par + _par(loads[judged:at], live), at
            phy2log = live.phy2log.clone()
            written += int((phy2log[layer] != ahead.phy2log[layer]).sum())
            phy2log[layer] = ahead.phy2log[layer]
            live = Placement.from_phy2log(phy2log, case.num_experts, case.topology)
        due += -(len(layers) * case.num_layers // -LAYERS) + interval + 1
    par = (par + _par(loads[judged:], live)) / (len(loads) * LAYERS)
    slots = written * case.num_layers / LAYERS
    return {
        "par": par,
        "slots": slots,
        "seconds": BALANCED_SECONDS * par + slots * SLOT_BYTES / BANDWIDTH,
        "plan_ms": 1e3 * statistics.median(seconds) if seconds else 0.0,
    }


def _par(loads: Tensor, live: Placement) -> float:
    """Sum over steps and layers of max / mean GPU load; counts of zero are one."""
    total = 0.0
    for first in range(0, len(loads), 256):
        steps = loads[first : first + 256]
        of_replica = steps.double().clamp(min=1) / live.logcnt
        of_slot = of_replica.gather(2, live.phy2log.expand(len(steps), -1, -1))
        by_gpu = of_slot.view(len(steps), LAYERS, live.topology.num_gpus, -1).sum(3)
        total += float((by_gpu.amax(2) / by_gpu.mean(2)).sum())
    return total


def price_of(case: Case, interval: int) -> float:
    """By the rules: the balanced time of a layer's step, and the steps that a plan serves."""
    return replan_price(SLOT_BYTES, BANDWIDTH, BALANCED_SECONDS / (STEPS * case.num_layers), interval)
