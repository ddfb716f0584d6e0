"""Replay: steps of a deployment one after the other, plans made on those that were, judged on those that come.

Nothing is kept but the steps that a planner is given: a day of steps may be streamed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eplb_triton.placement import Placement

Plan = Callable[[Tensor, "Placement | None"], Placement]
"""Of a history [n, L, E], oldest step first, and the placement in force, None if there is none: the next placement."""


@dataclass(frozen=True)
class Rules:
    """When plans are made and how they come into force.

    Args:
        interval: steps between the end of a deployment and the next plan.
        keep: steps that a planner is given at most, the newest.
        layer_steps: steps that the deployment of a layer takes; 0: a plan is in force at once; between 0 and 1: several
            layers come into force in a step.
        least_load: loads below it are judged as if they were it: of experts that nobody asked for in a step.

    Raises:
        ValueError: an argument outside its range.
    """

    interval: int
    keep: int = 4096
    layer_steps: float = 1.0
    least_load: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"interval": 1, "keep": 1, "layer_steps": 0, "least_load": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"Rules.{name}={getattr(self, name)!r} must be at least {least}")


class Step(NamedTuple):
    """One step, judged by the placement that was in force; every expert's load is spread evenly over its replicas."""

    peak: Tensor  # [L] float64, load of the busiest GPU
    mean: Tensor  # [L] float64, mean GPU load
    written: int  # slots written after it
    planned: float  # seconds that a plan made after it took, 0 where none was


@dataclass
class Summary:
    """Steps taken together. Layers without load are balanced: 1."""

    steps: int = 0
    layer_steps: int = 0
    par: float = 0.0  # sum over steps and layers of peak / mean
    peak: float = 0.0
    mean: float = 0.0
    written: int = 0
    plan_seconds: list[float] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Count a step in."""
        ratio = torch.where(step.mean > 0, step.peak / step.mean, 1.0)
        self.steps += 1
        self.layer_steps += len(ratio)
        self.par += float(ratio.sum())
        self.peak += float(step.peak.sum())
        self.mean += float(step.mean.sum())
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


def replay_steps(steps: Iterable[Tensor], start: Placement | None, plan: Plan, rules: Rules) -> Iterator[Step]:
    """Judge every step by the placement in force, and plan and deploy as `rules` say.

    A plan's layers come into force in its `deployment_order` where it has one, else in theirs; a plan is made of the
    steps before, and nothing of those to come.

    Args:
        steps: loads [L, E] of one step after the other.
        start: the placement in force at first. None: the first `interval` steps are only recorded; the plan on them is
            the first placement, and its slots are not counted.
        plan: makes a plan.
        rules: when.

    Yields:
        A Step for each of `steps`; none for those that are only recorded.
    """
    history: deque[Tensor] = deque(maxlen=rules.keep)
    live = start
    waiting: deque[tuple[int, Tensor]] = deque()  # layers to deploy, with their slots
    due, ready = rules.interval + (1 if rules.layer_steps and start is not None else 0), 0.0
    for number, loads in enumerate(steps, 1):
        judged = None if live is None else _gpu_loads(loads, live, rules.least_load)
        history.append(loads)
        written, seconds = 0, 0.0
        if waiting and live is not None:
            ready += 1
            live, written = _deploy(live, waiting, int(ready / rules.layer_steps))
            ready -= rules.layer_steps * int(ready / rules.layer_steps)
            if not waiting:
                due, ready = number + rules.interval + 1, 0.0
        elif number == due:
            began = time.perf_counter()
            ahead = plan(torch.stack(list(history)), live)
            seconds = time.perf_counter() - began
            if live is None:
                live, due = ahead, number + rules.interval
            elif rules.layer_steps == 0:
                written = int(ahead.moved(live).slots.sum())
                live, due = ahead, number + rules.interval
            else:
                waiting.extend(_queue(ahead))
                due = number + rules.interval + 1
        if judged is not None:
            yield Step(judged.amax(1), judged.mean(1), written, seconds)


def _gpu_loads(loads: Tensor, live: Placement, least_load: float) -> Tensor:
    return live.gpu_loads(loads.clamp(min=least_load) if least_load else loads)


def _queue(ahead: Placement) -> list[tuple[int, Tensor]]:
    """Layers and their slots in the order of deployment."""
    order = ahead.deployment_order().tolist() if ahead.changes is not None else range(ahead.num_layers)
    return [(layer, ahead.phy2log[layer]) for layer in order if layer >= 0]


def _deploy(live: Placement, waiting: deque[tuple[int, Tensor]], num_layers: int) -> tuple[Placement, int]:
    """Put so many of the layers that wait in force: the placement then, and the slots that differ."""
    phy2log, written = live.phy2log.clone(), 0
    for _ in range(min(num_layers, len(waiting))):
        layer, slots = waiting.popleft()
        written += int((phy2log[layer] != slots).sum())
        phy2log[layer] = slots
    return Placement.from_phy2log(phy2log, live.num_experts, live.topology, live.policy), written
