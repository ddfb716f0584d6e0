"""Comparing policies on the same windows of loads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from eplb_triton import POLICIES, Placement, Topology, plan
from eplb_triton.cli.gaps import gaps_of
from eplb_triton.constants import NEWEST_STEPS
from eplb_triton.formats import Recording
from eplb_triton.policy import Policy
from eplb_triton.replay import Deployment, History, Rules, Summary

UNPLANNED = "none (experts spread in order)"


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a recording, all of one size.

    Args:
        recording: what is cut.
        asked: the size asked for.
        size: steps or tokens of a window: as asked for, but no more than the recording has.
        count: whole windows.
        left_out: steps or tokens after the last whole window.
    """

    recording: Recording
    asked: int
    size: int
    count: int
    left_out: int

    @classmethod
    def cut(cls, recording: Recording, size: int) -> Windows:
        """Windows of `size`; a recording shorter than one window is one window."""
        whole = min(size, recording.length)
        return cls(recording, size, whole, recording.length // whole, recording.length % whole)

    def loads(self, index: int) -> Tensor:
        """[L, E] float64, loads of a window."""
        return self.recording.loads(index * self.size, (index + 1) * self.size)

    def steps(self, index: int) -> Tensor:
        """[n, L, E] float64, loads of a window step by step."""
        return self.recording.steps_of(index * self.size, (index + 1) * self.size)


@dataclass
class Outcome:
    """What one policy did, window by window.

    Args:
        policy: its name.
        placement: the plan of the last window, None before the first.
        planned: balancedness on the window that was planned, one a window.
        gaps: [L] float64, gap of each layer to the lower bound on the window that was planned, one a window.
        following: per-step balancedness of the plan of each window but the last on the window after it.
        moved: slots whose expert changed from one plan to the next, mean over layers.
        fetched: experts that a GPU did not hold before, from one plan to the next, mean over layers.
        duplicates: replicas that share a GPU with another of their expert, mean over layers, one a window.
        milliseconds: time of each plan; none where nothing was planned.
    """

    policy: str
    placement: Placement | None = None
    planned: list[float] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    following: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)
    duplicates: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def add(self, weight: Tensor, bound: Tensor, placement: Placement) -> None:
        """Take in the plan of the next window: its loads [L, E], and the lower bound [L]."""
        if self.placement is not None:
            moved = placement.moved(self.placement)
            self.moved.append(float(moved.slots.double().mean()))
            self.fetched.append(float(moved.fetches.double().mean()))
        self.planned.append(placement.balancedness(weight))
        self.gaps.append(gaps_of(placement, weight, bound))
        self.duplicates.append(float(placement.duplicates().double().mean()))
        self.placement = placement


class _Contender:
    """What plans at the end of every window, and is judged step by step in the next, where its plan serves.

    Args:
        outcome: where to note what it did.
        windows: the loads.
        bounds: [L], the lower bound of every window.
        history: the steps so far.
        make: of the history, the loads of the window and the placement in force: the next placement.
        advance: called after each plan, which is timed; None: nothing is planned.
    """

    def __init__(
        self,
        outcome: Outcome,
        windows: Windows,
        bounds: Sequence[Tensor],
        history: History,
        make: Callable[[Tensor, Tensor, Placement | None], Placement],
        advance: Callable[[], None] | None = None,
    ) -> None:
        self._outcome, self._windows, self._bounds = outcome, windows, bounds
        self._make, self._advance = make, advance
        rules = Rules(len(windows.steps(0)), NEWEST_STEPS, layer_steps=0)
        self._deployment = Deployment(None, self._plan, rules, history)

    def serve(self, step: Tensor, summary: Summary) -> None:
        """Be judged by a step, and plan after the last of a window."""
        for judgement in self._deployment.serve(step):
            summary.add(judgement)

    def _plan(self, history: Tensor, live: Placement | None) -> Placement:
        index = len(self._outcome.planned)
        weight = self._windows.loads(index)
        if self._advance is not None and index == 0:
            self._make(history, weight, live)
        start = time.perf_counter()
        placement = self._make(history, weight, live)
        if self._advance is not None:
            self._outcome.milliseconds.append((time.perf_counter() - start) * 1e3)
            self._advance()
        self._outcome.add(weight, self._bounds[index], placement)
        return placement


def _maker(policy: Policy, topology: Topology, backend: str) -> Callable[[Tensor, Tensor, Placement | None], Placement]:
    """What plans by a policy: from what is in force by all steps, or anew by the window."""

    def make(history: Tensor, weight: Tensor, live: Placement | None) -> Placement:
        loads, previous = (history, live) if policy.replan else (weight, None)
        return plan(loads, topology, policy=policy, previous=previous, backend=backend)

    return make


def compare_policies(
    windows: Windows, bounds: Sequence[Tensor], topology: Topology, backend: str, advance: Callable[[], None]
) -> tuple[Outcome, list[Outcome]]:
    """Plan every window with every policy: one that replans from its own last plan by all steps so far, the others anew
    by the window.

    The policies take turns on each window, so that what else the machine does falls on all of them; each is run
    once untimed before, since a backend may compile on its first call.

    Args:
        windows: the loads.
        bounds: [L], the lower bound of every window.
        topology: what to plan for.
        backend: see `plan`.
        advance: called after each plan.

    Returns:
        The outcome of experts spread in order, and that of every policy in the order of `POLICIES`.

    Raises:
        ValueError: see `plan`.
    """
    recording, history = windows.recording, History(NEWEST_STEPS)
    in_order = Placement.spread_in_order(recording.num_layers, recording.num_experts, topology)
    outcomes = [Outcome(UNPLANNED), *(Outcome(name) for name in POLICIES)]
    contenders = [_Contender(outcomes[0], windows, bounds, history, lambda *_: in_order)]
    for outcome in outcomes[1:]:
        make = _maker(POLICIES[outcome.policy], topology, backend)
        contenders.append(_Contender(outcome, windows, bounds, history, make, advance))
    for index in range(windows.count):
        summaries = [Summary() for _ in contenders]
        for step in windows.steps(index):
            history.add(step)
            for contender, summary in zip(contenders, summaries, strict=True):
                contender.serve(step, summary)
        for outcome, summary in zip(outcomes, summaries, strict=True):
            if summary.steps:
                outcome.following.append(summary.balancedness)
    return outcomes[0], outcomes[1:]


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return statistics.fmean(values) if values else None


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None
