"""Times on a GPU: events around calls, replays of a captured graph, and an empty kernel beside both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from bench.cases import Case
from bench.measure import summary
from bench.planners.ours import one_line
from eplb_triton import plan

_WARM_UP = 10
_REPEATS = 100


@triton.jit  # type: ignore[untyped-decorator]
def empty_kernel() -> None:
    """Nothing: what a launch costs by itself."""
    return


def gpu_times(case: Case, series: Tensor, policies: list[str]) -> list[dict[str, Any]]:
    """Event and graph times of every policy on `series` [T, L, E] of the case, and of an empty kernel.

    Events time calls one by one, launch gaps included; a graph replay has no host work in it. The windows take
    turns, so that no call finds the loads of the one before in the cache; a graph holds one call on each window, and
    its time is divided by their number.
    """
    windows = [loads.cuda() for loads in series]
    runs: dict[str, list[Callable[[], Any]]] = {"empty kernel": [empty_kernel[(1,)]] * len(windows)}
    for policy in policies:
        runs[policy] = [_bind(loads, case, policy) for loads in windows]
    rows = []
    for name, calls in runs.items():
        row: dict[str, Any] = {"case": case.name, "planner": name}
        for how, timer in (("events", _events), ("graph", _graph)):
            try:
                milliseconds = timer(calls)
            except Exception as error:  # a policy that cannot be captured is a line of the report
                row[how] = {"error": one_line(error)}
                torch.cuda.synchronize()
            else:
                row[how] = {"milliseconds": milliseconds, **summary(milliseconds)}
        rows.append(row)
    return rows


def _bind(loads: Tensor, case: Case, policy: str) -> Callable[[], Any]:
    return lambda: plan(loads, case.topology, policy=policy, backend="triton")


def _events(calls: list[Callable[[], Any]]) -> list[float]:
    for at in range(_WARM_UP):
        calls[at % len(calls)]()
    pairs = []
    for at in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        calls[at % len(calls)]()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _graph(calls: list[Callable[[], Any]]) -> list[float]:
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # capture wants everything compiled and allocated, on a stream of its own
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # results stay alive as long as the graph writes them
    times = _events([graph.replay])
    del kept
    return [milliseconds / len(calls) for milliseconds in times]
