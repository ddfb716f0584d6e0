"""Comparing policies on the same windows of loads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from eplb_triton import POLICIES, Placement, Topology, plan
from eplb_triton.cli.gaps import gaps_of
from eplb_triton.formats import Recording

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

    def history(self, index: int) -> Tensor:
        """[n, L, E] float64, the steps of this window and of all before it, oldest first."""
        return self.recording.steps_of(0, (index + 1) * self.size)


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

    def add(self, weight: Tensor, steps: Tensor, bound: Tensor, placement: Placement) -> None:
        """Take in the plan of the next window: its loads [L, E], its steps [n, L, E], and the lower bound [L].

        What was in force until then is judged by the steps.
        """
        if self.placement is not None:
            moved = placement.moved(self.placement)
            self.following.append(balancedness_by_step(self.placement, steps))
            self.moved.append(float(moved.slots.double().mean()))
            self.fetched.append(float(moved.fetches.double().mean()))
        self.planned.append(placement.balancedness(weight))
        self.gaps.append(gaps_of(placement, weight, bound))
        self.duplicates.append(float(placement.duplicates().double().mean()))
        self.placement = placement


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
    recording = windows.recording
    unplanned = Outcome(UNPLANNED)
    in_order = Placement.spread_in_order(recording.num_layers, recording.num_experts, topology)
    outcomes = [Outcome(name) for name in POLICIES]
    for index, bound in enumerate(bounds):
        weight, steps = windows.loads(index), windows.steps(index)
        history = windows.history(index)
        unplanned.add(weight, steps, bound, in_order)
        for outcome in outcomes:
            policy = POLICIES[outcome.policy]
            loads, previous = (history, outcome.placement) if policy.replan else (weight, None)
            if index == 0:
                plan(loads, topology, policy=policy, backend=backend)
            start = time.perf_counter()
            placement = plan(loads, topology, policy=policy, previous=previous, backend=backend)
            outcome.milliseconds.append((time.perf_counter() - start) * 1e3)
            outcome.add(weight, steps, bound, placement)
            advance()
    return unplanned, outcomes


def balancedness_by_step(placement: Placement, steps: Tensor) -> float:
    """Mean GPU loads summed over steps and layers / max GPU loads summed alike; 1 without load.

    Args:
        placement: what is judged.
        steps: [n, L, E], loads of each step.
    """
    mean_loads = peaks = 0.0
    for step in steps:
        on_gpus = placement.gpu_loads(step)
        mean_loads += float(on_gpus.mean(1).sum())
        peaks += float(on_gpus.amax(1).sum())
    return mean_loads / peaks if peaks else 1.0


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return statistics.fmean(values) if values else None


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None
