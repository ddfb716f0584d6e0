"""Times: all planners of a case in one process, interleaved round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.planners.ours import Call, one_line

MIN_ROUNDS = 3
MAX_ROUNDS = 60


@dataclass
class Timing:
    """One planner in the rounds of one case.

    Args:
        calls: one a window.
        milliseconds: one a round, from the first round on without a gap.
        results: what the first call on each window returned.
        error: why it left the rounds, if it did.
    """

    calls: Sequence[Call]
    milliseconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    error: str = ""

    def wants(self, number: int, seconds: float) -> bool:
        """Whether it takes part in round `number`: always in the first `MIN_ROUNDS`, then while time is left."""
        if self.error:
            return False
        return number < MIN_ROUNDS or sum(self.milliseconds) + self.milliseconds[-1] < seconds * 1e3

    def call(self, number: int, *, keep: bool) -> None:
        """Plan window `number` modulo windows; with `keep`, note the time and, the first time, the result."""
        call = self.calls[number % len(self.calls)]
        try:
            begin = time.perf_counter_ns()
            result = call()
            end = time.perf_counter_ns()
        except Exception as error:  # a peer may raise anything; it becomes a line of the report
            self.error = one_line(error)
            return
        if keep:
            self.milliseconds.append((end - begin) / 1e6)
            if len(self.results) < len(self.calls):
                self.results.append(result)


def interleave(
    calls: Mapping[str, Sequence[Call]],
    seconds: float,
    tick: Callable[[str], None] = lambda _: None,
    *,
    warm: bool = False,
) -> dict[str, Timing]:
    """Time every planner on every window, round by round.

    One call of each warms up. A round is then one call of every planner that still takes part, all on the same
    window, in an order that rotates by one from round to round; garbage is collected between rounds only.

    Args:
        calls: of each planner one call a window, at most `MIN_ROUNDS` windows, so that all of them are planned.
        seconds: time a planner may spend; slower ones get `MIN_ROUNDS` rounds all the same, none gets more than
            `MAX_ROUNDS`.
        tick: called with the name of the planner about to be called.
        warm: let an untimed call of the same planner precede each timed one, which else finds in the caches of the CPU
            what another planner left there.
    """
    timings = {name: Timing(windows) for name, windows in calls.items()}
    for name, timing in timings.items():
        tick(name)
        timing.call(0, keep=False)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(MAX_ROUNDS):
            gc.collect()
            active = [name for name, timing in timings.items() if timing.wants(number, seconds)]
            if not active:
                break
            turn = number % len(active)
            for name in active[turn:] + active[:turn]:
                tick(name)
                if warm:
                    timings[name].call(number, keep=False)
                timings[name].call(number, keep=True)
    finally:
        if collecting:
            gc.enable()
    return timings


def summary(milliseconds: Sequence[float], reference: Sequence[float] = ()) -> dict[str, float | int]:
    """Median, 10th and 90th percentile and rounds; and how many times as fast as `reference`.

    The ratio is the median over the rounds both took part in of reference time / own time in that round.
    """
    low, median, high = np.percentile(milliseconds, [10, 50, 90])
    figures: dict[str, float | int] = {
        "median_ms": float(median),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "rounds": len(milliseconds),
    }
    if reference:
        both = min(len(milliseconds), len(reference))
        ratios = np.divide(reference[:both], milliseconds[:both])
        figures["times_as_fast"] = float(np.median(ratios))
    return figures
