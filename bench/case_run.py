"""One case: all planners on the same loads, timed round by round, then judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.cases import WINDOWS, Case, digest
from bench.planners.ours import PUBLISHED, SOURCE, Planner, Skip, as_placement, one_line
from bench.planners.peers import VLLM, vllm_in_float32
from bench.quality import causes, quality, same_layers
from bench.style import UNPLANNED
from eplb_triton import POLICIES, Placement
from eplb_triton.testing.models import Model

PLANNED = WINDOWS - 1
"""Windows that are planned; the last one only judges."""
_DRAWN = "v3-hierarchical"
"""The case whose GPU loads are kept for the picture."""


def run_case(
    case: Case,
    loads: Tensor,
    planners: Sequence[Planner],
    seconds: float,
    skips: list[Skip],
    tick: Callable[[str], None],
    *,
    warm: bool = False,
) -> dict[str, Any]:
    """Time and judge the planners on loads [T, L, E]; those that fail are added to `skips`."""
    calls = {}
    for planner in planners:
        try:
            calls[planner.name] = [planner.bind(window, case.topology) for window in loads[:PLANNED]]
        except Exception as error:  # a peer may refuse a topology in any way; it becomes a line of the report
            skips.append(Skip(planner.name, one_line(error), case.name))
    timings = measure.interleave(calls, seconds, tick, warm=warm)
    placements: dict[str, list[Placement]] = {}
    for planner in planners:
        if planner.name not in timings:
            continue
        timing = timings[planner.name]
        try:
            if timing.error:
                raise RuntimeError(timing.error)
            plans = [as_placement(planner, result, case.experts, case.topology) for result in timing.results]
            for plan in plans:
                plan.validate()
        except Exception as error:  # what is no placement cannot be judged: a line of the report
            skips.append(Skip(planner.name, one_line(error), case.name))
        else:
            placements[planner.name] = plans
    reference = timings[VLLM].milliseconds if VLLM in placements else ()
    row: dict[str, Any] = {
        "case": {**asdict(case), "tie_free": case.tie_free, "loads_digest": digest(loads)},
        "unplanned": quality([Placement.spread_in_order(case.layers, case.experts, case.topology)] * PLANNED, loads),
        "results": {
            name: {
                "milliseconds": timings[name].milliseconds,
                **measure.summary(timings[name].milliseconds, reference),
                **quality(plans, loads),
            }
            for name, plans in placements.items()
        },
        "same_maps": _same_maps(case, planners, placements, loads[:PLANNED]),
    }
    if case.name == _DRAWN:
        row["gpu_loads"] = _gpu_loads(case, placements, loads[0])
    if torch.cuda.is_available():
        policies = [planner.algorithm for planner in planners if planner.name.endswith("@triton")]
        row["gpu"] = _on_gpu(case, loads[0], [name for name in policies if not POLICIES[name].replan], skips)
    return row


def _on_gpu(case: Case, loads: Tensor, policies: Sequence[str], skips: list[Skip]) -> list[dict[str, Any]]:
    """Times of the kernels of every policy on loads [L, E]; those that cannot be captured are added to `skips`."""
    from bench.gpu import bind, times_of  # noqa: PLC0415 - needs triton and a GPU

    rows = []
    for policy in policies:
        try:
            times = times_of(bind(Model(case.layers, case.experts, case.topology), POLICIES[policy]), loads.cuda())
        except Exception as error:  # becomes a line of the report
            skips.append(Skip(f"{policy}@triton", f"graph replays: {one_line(error)}", case.name))
        else:
            rows.append({"planner": policy, **times._asdict()})
    return rows


def _same_maps(
    case: Case, planners: Sequence[Planner], placements: dict[str, list[Placement]], windows: Tensor
) -> dict[str, dict[str, Any]]:
    """Of each planner of the published algorithm: layers with vLLM's counts, with its maps, and why not.

    And, on the first window, the same against vLLM's planner held in float32.
    """
    table = {}
    in_float32 = vllm_in_float32() if VLLM in placements else None
    held = [in_float32.placement(windows[0], case.topology)] if in_float32 else []
    for planner in planners:
        if planner.algorithm != PUBLISHED or planner.name == VLLM or not {planner.name, VLLM} <= placements.keys():
            continue
        table[planner.name] = _compare(placements[planner.name], placements[VLLM], windows)
        if held and planner.source == SOURCE:
            table[f"{planner.name}, against vllm in float32"] = _compare(placements[planner.name][:1], held, windows)
    return table


def _compare(mine: Sequence[Placement], theirs: Sequence[Placement], windows: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"layers": 0, "equal_counts": 0, "equal_maps": 0, "causes": {}}
    for left, right, loads in zip(mine, theirs, windows[: len(mine)], strict=True):
        counts, maps = same_layers(left, right)
        row["layers"] += len(maps)
        row["equal_counts"] += int(counts.sum())
        row["equal_maps"] += int(maps.sum())
        for cause in causes(loads[~maps], right.logcnt[~maps], right.topology):
            row["causes"][cause] = row["causes"].get(cause, 0) + 1
    return row


def _gpu_loads(case: Case, placements: dict[str, list[Placement]], loads: Tensor) -> dict[str, list[list[float]]]:
    """Of the unplanned state and each planner's first plan: GPU loads [L, D], in units of the layer's mean."""
    unplanned = Placement.spread_in_order(case.layers, case.experts, case.topology)
    shown = {UNPLANNED: unplanned, **{name: plans[0] for name, plans in placements.items()}}
    table = {}
    for name, placement in shown.items():
        by_gpu = placement.gpu_loads(loads)
        relative = by_gpu / by_gpu.mean(1, keepdim=True)
        table[name] = [[round(load, 6) for load in layer] for layer in relative.tolist()]
    return table
