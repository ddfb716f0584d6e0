"""A deployment: the placement in force, and the plans that take its place."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from eplb_triton.loads import as_loads
from eplb_triton.placement import Placement
from eplb_triton.replay.splits import EVEN, TABLE_STEPS, Splitter
from eplb_triton.replay.tallies import Step

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
        once: whether only the first plan is made, which then stays.

    Raises:
        ValueError: an argument outside its range.
    """

    interval: int
    keep: int = 4096
    layer_steps: float = 1.0
    least_load: float = 0.0
    once: bool = False

    def __post_init__(self) -> None:
        for name, least in {"interval": 1, "keep": 1, "layer_steps": 0, "least_load": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"Rules.{name}={getattr(self, name)!r} must be at least {least}")


class History:
    """The newest steps, rounded once to float32, for all deployments that serve them.

    Args:
        keep: how many, at most.
    """

    def __init__(self, keep: int) -> None:
        self._steps: deque[Tensor] = deque(maxlen=keep)
        self._stacked: dict[int, Tensor] = {}  # what was asked for since the last step, as is
        self._summed: dict[int, Tensor] = {}

    def add(self, loads: Tensor) -> None:
        """Take in the loads [L, E] of a step. ValueError: one that nobody can plan with."""
        self._steps.append(as_loads(loads, name="loads"))
        self._stacked.clear()
        self._summed.clear()

    def newest(self, most: int) -> Tensor:
        """[n, L, E] float32, the newest `most` steps or as many as there are, oldest first."""
        count = min(most, len(self._steps))
        if count not in self._stacked:
            self._stacked[count] = torch.stack(list(islice(self._steps, len(self._steps) - count, None)))
        return self._stacked[count]

    def sum_of(self, most: int) -> Tensor:
        """[L, E] float64, the loads of the newest `most` steps together."""
        if most not in self._summed:
            total = torch.zeros(self._steps[-1].shape, dtype=torch.float64, device="cpu")
            for step in islice(self._steps, max(0, len(self._steps) - most), None):
                total += step
            self._summed[most] = total
        return self._summed[most]


class Deployment:
    """A placement that serves steps, and planning and deployment as `rules` say.

    A plan's layers come into force in its `deployment_order` where it has one, else in theirs; a plan is made of the
    steps before, and nothing of those to come.

    Args:
        start: the placement in force at first. None: the first `interval` steps are only recorded; the plan on them is
            the first placement, and its slots are not counted.
        plan: makes a plan; None: none is made, `start` stays.
        rules: when.
        history: the steps so far; whoever feeds this deployment adds each step to it first.
        splits: how tokens are split among replicas, see `splits`.
    """

    def __init__(
        self,
        start: Placement | None,
        plan: Plan | None,
        rules: Rules,
        history: History,
        splits: Sequence[str] = (EVEN,),
    ) -> None:
        self.live = start
        self._plan, self._rules, self._history = plan, rules, history
        self._splitter = Splitter(splits)
        self._waiting: deque[tuple[int, Tensor]] = deque()  # layers to deploy, with their slots
        self._number, self._ready = 0, 0.0
        self._due = rules.interval + (1 if rules.layer_steps and start is not None else 0)

    def serve(self, loads: Tensor) -> list[Step]:
        """Judge the loads [L, E] of a step, which is the newest of the history, then plan or deploy.

        Returns:
            One Step, or none where nothing is in force.
        """
        self._number += 1
        on_gpus = None
        if self.live is not None:
            least = self._rules.least_load
            on_gpus = self._splitter.gpu_loads(loads.clamp(min=least) if least else loads, self.live)
        written, seconds = 0, 0.0
        changed: list[int] = []
        if self._waiting:
            written, changed = self._deploy()
        elif self._plan is not None and self._number == self._due:
            began = time.perf_counter()
            ahead = self._plan(self._history.newest(self._rules.keep), self.live)
            seconds = time.perf_counter() - began
            written, changed = self._take_over(ahead)
        if self.live is not None:
            self._splitter.after_step(self.live, self._history, changed)
        return [] if on_gpus is None else [Step(on_gpus, written, seconds)]

    def finish(self) -> list[Step]:
        """Nothing: every step was judged when it was served."""
        return []

    def _take_over(self, ahead: Placement) -> tuple[int, list[int]]:
        """Put a plan in force, or its layers into the queue: slots written, layers changed."""
        written, changed = 0, list(range(ahead.num_layers))
        self._due = self._number + self._rules.interval
        if self._rules.once:
            self._plan = None
        if self.live is None:
            self.live = ahead
        elif self._rules.layer_steps == 0:
            written, self.live = int(ahead.moved(self.live).slots.sum()), ahead
        else:
            self._waiting.extend(_queue(ahead))
            self._due += 1
            changed = []
        return written, changed

    def _deploy(self) -> tuple[int, list[int]]:
        """Put in force the layers whose time has come: slots that differ, and the layers."""
        assert self.live is not None
        self._ready += 1
        count = min(int(self._ready / self._rules.layer_steps), len(self._waiting))
        self._ready -= self._rules.layer_steps * int(self._ready / self._rules.layer_steps)
        live, written, changed = self.live, 0, []
        if count:
            phy2log = live.phy2log.clone()
            for _ in range(count):
                layer, slots = self._waiting.popleft()
                written += int((phy2log[layer] != slots).sum())
                phy2log[layer] = slots
                changed.append(layer)
            self.live = Placement.from_phy2log(phy2log, live.num_experts, live.topology, live.policy)
        if not self._waiting:
            self._due, self._ready = self._number + self._rules.interval + 1, 0.0
        return written, changed


class Foresight:
    """What could be reached if the loads to come were known: a plan for the steps that follow, in force at once.

    No deployment can do that, and no bound either: the planner may miss the best placement of what it sees.

    Args:
        start: the placement in force at first.
        plan: makes a plan of the next `interval` steps and the placement in force.
        interval: steps that a plan foresees and serves.
        splits: as of a Deployment.
        least_load: as of Rules.
    """

    def __init__(
        self,
        start: Placement,
        plan: Plan,
        interval: int,
        splits: Sequence[str] = (EVEN,),
        least_load: float = 0.0,
    ) -> None:
        self.live = start
        self._plan, self._interval, self._least_load = plan, interval, least_load
        self._splitter, self._served = Splitter(splits), History(TABLE_STEPS)
        self._ahead: list[Tensor] = []

    def serve(self, loads: Tensor) -> list[Step]:
        """Note the loads [L, E] of a step; once there are `interval`, plan for them and judge them."""
        self._ahead.append(loads)
        return self.finish() if len(self._ahead) == self._interval else []

    def finish(self) -> list[Step]:
        """Plan for the steps noted since the last plan and judge them."""
        if not self._ahead:
            return []
        began = time.perf_counter()
        ahead = self._plan(torch.stack([as_loads(loads, name="loads") for loads in self._ahead]), self.live)
        seconds = time.perf_counter() - began
        written, self.live = int(ahead.moved(self.live).slots.sum()), ahead
        steps, layers = [], list(range(ahead.num_layers))
        for loads in self._ahead:
            usable = loads.clamp(min=self._least_load) if self._least_load else loads
            steps.append(Step(self._splitter.gpu_loads(usable, ahead), written, seconds))
            self._served.add(loads)
            self._splitter.after_step(ahead, self._served, layers)
            written, seconds, layers = 0, 0.0, []
        self._ahead.clear()
        return steps


def replay_steps(
    steps: Iterable[Tensor], start: Placement | None, plan: Plan, rules: Rules, splits: Sequence[str] = (EVEN,)
) -> Iterator[Step]:
    """Judge every step by the placement in force, and plan and deploy as `rules` say.

    Args:
        steps: loads [L, E] of one step after the other.
        start, plan, rules, splits: as of a `Deployment`.

    Yields:
        A Step for each of `steps`; none for those that are only recorded.
    """
    history = History(rules.keep)
    deployment = Deployment(start, plan, rules, history, splits)
    for loads in steps:
        history.add(loads)
        yield from deployment.serve(loads)


def judged(steps: Iterable[Tensor], placement: Placement, splits: Sequence[str] = (EVEN,)) -> Iterator[Step]:
    """Every step [L, E] of `steps`, judged by a placement that stays."""
    history = History(TABLE_STEPS)
    deployment = Deployment(placement, None, Rules(1), history, splits)
    for loads in steps:
        history.add(loads)
        yield from deployment.serve(loads)


def _queue(ahead: Placement) -> list[tuple[int, Tensor]]:
    """Layers and their slots in the order of deployment."""
    order = ahead.deployment_order().tolist() if ahead.changes is not None else range(ahead.num_layers)
    return [(layer, ahead.phy2log[layer]) for layer in order if layer >= 0]
