"""The rules of the serving simulation: cases, what one planner is worth to each, and scores.

`bench.studies.serving` says how, and runs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.replans import replan_price
from eplb_triton.replay import Plan
from eplb_triton.synthetic import serving_steps

BALANCED_SECONDS, SLOT_BYTES, BANDWIDTH = 60.0, 88_080_384, 900e9
STEPS = 6144


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

    def start(self, layers: int) -> Placement:
        """Experts in order over the GPUs, the last slot of each repeats the one before; `layers` of them, all alike."""
        gpus, slots = self.num_gpus, self.topology.slots_per_gpu
        table = torch.arange(gpus).unsqueeze(1) * (slots - 1) + torch.arange(slots - 1)
        table = torch.cat((table, table[:, -1:]), 1).flatten() % self.num_experts
        return Placement.from_phy2log(table.repeat(layers, 1), self.num_experts, self.topology)


WEIGHTS = {"R1": 3, "Mix": 1, "Qwen3": 3}
CASES = (
    *(Case("R1", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Mix", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Qwen3", 94, 128, gpus) for gpus in (32, 64, 128)),
)


BASELINE = ("deepseek", 1024)
"""The planner and interval that scores 100."""


def draw(kind: str, num_experts: int, layers: int, seed: int) -> Tensor:
    """Loads [n, layers, E] float32 of a kind of traffic."""
    loads = torch.empty(STEPS, layers, num_experts)
    for step, counts in enumerate(serving_steps(STEPS, layers, num_experts, mixed=kind == "Mix", seed=seed)):
        loads[step] = counts
    return loads


def simulate(case: Case, loads: Tensor, plan: Plan, interval: int) -> dict[str, float]:
    """PAR, slots written (of all layers) and modelled seconds of one planner on one case.

    A layer keeps its placement for many steps: those are judged together.

    loads: [n, layers, E] float32. Fewer layers than the case has stand for all.
    """
    num_steps, num_layers, _ = loads.shape
    live, due = case.start(num_layers), interval + 1
    judged = [0] * num_layers  # steps of each layer
    par, written, seconds = 0.0, 0, []
    while due < num_steps:
        began = time.perf_counter()
        ahead = plan(loads[:due], live)
        seconds.append(time.perf_counter() - began)
        order = ahead.deployment_order().tolist() if ahead.changes is not None else range(num_layers)
        layers = [layer for layer in order if layer >= 0]
        phy2log = live.phy2log.clone()
        for k, layer in enumerate(layers):  # the k-th stands for those in force up to case.num_layers / num_layers
            at = due - (2 * k + 1) * case.num_layers // (-2 * num_layers)  # steps later: their middle, rounded up
            if at > num_steps:
                break
            par += _par(loads[judged[layer] : at, layer], phy2log[layer], case)
            judged[layer] = at
            written += int((phy2log[layer] != ahead.phy2log[layer]).sum())
            phy2log[layer] = ahead.phy2log[layer]
        live = Placement.from_phy2log(phy2log, case.num_experts, case.topology)
        due += -(len(layers) * case.num_layers // -num_layers) + interval + 1
    par += sum(_par(loads[judged[layer] :, layer], live.phy2log[layer], case) for layer in range(num_layers))
    par /= num_steps * num_layers
    slots = written * case.num_layers / num_layers
    return {
        "layers": num_layers,
        "par": par,
        "slots": slots,
        "seconds": BALANCED_SECONDS * par + slots * SLOT_BYTES / BANDWIDTH,
        "plan_ms": 1e3 * statistics.median(seconds) if seconds else 0.0,
    }


def _par(loads: Tensor, phy2log: Tensor, case: Case) -> float:
    """Sum over steps of max / mean GPU load of one layer; counts of zero are one.

    loads: [n, E]. phy2log: [P], in force in all of them.
    """
    of_expert = loads.double().clamp(min=1).T.contiguous()  # gathered by rows: 2 to 3 times as fast as by columns
    of_slot = (of_expert / phy2log.bincount(minlength=case.num_experts).unsqueeze(1))[phy2log]
    by_gpu = of_slot.view(case.num_gpus, case.topology.slots_per_gpu, len(loads)).sum(1)
    return float((by_gpu.amax(0) / by_gpu.mean(0)).sum())


def price_of(case: Case, interval: int) -> float:
    """By the rules: the balanced time of a layer's step, and the steps that a plan serves."""
    return replan_price(SLOT_BYTES, BANDWIDTH, BALANCED_SECONDS / (STEPS * case.num_layers), interval)


def scores(
    rows: Sequence[dict[str, Any]], *, summed: bool = False, by_case: bool = False
) -> dict[tuple[str, int], float]:
    """By planner and interval: scores of the cases and seeds of a kind alike, kinds by their weights.

    summed: a kind's score is that of its cases' times together; the larger the case, the more it counts.
    by_case: the weight is that of every case of a kind, not of all of them together.
    """
    base = {_case(row): row["seconds"] for row in rows if (row["planner"], row["interval"]) == BASELINE}
    found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        of_kinds = found.setdefault((row["planner"], row["interval"]), {})
        of_kinds.setdefault(row["kind"], []).append((base[_case(row)], row["seconds"]))

    def of_kind(times: list[tuple[float, float]]) -> float:
        if summed:
            return 100 * sum(before for before, _ in times) / sum(after for _, after in times)
        return statistics.fmean(100 * before / after for before, after in times)

    def weight(kind: str, times: list[tuple[float, float]]) -> int:
        return WEIGHTS[kind] * (len(times) if by_case else 1)

    return {
        planner: sum(weight(kind, times) * of_kind(times) for kind, times in of_kinds.items())
        / sum(weight(kind, times) for kind, times in of_kinds.items())
        for planner, of_kinds in found.items()
    }


def _case(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["kind"], row["gpus"], row["seed"]
