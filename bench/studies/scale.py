"""`make bench-scale`: what a plan costs as layers, experts, replicas and GPUs grow, and with which exponent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch

from bench import measure, results, style, tables
from bench.cases import Case, select, series
from bench.machine import environment
from bench.planners.ours import PUBLISHED, Planner, Skip, ours, probe
from bench.planners.peers import VLLM, peers
from bench.progress import Steps
from eplb_triton import Topology

Axis = Literal["L", "E", "P/E", "D"]

PLANNERS = "deepseek@reference,deepseek@cpu,deepseek@triton,vllm"
"""Curves drawn by default: SGLang's planner takes minutes at 1024 GPUs."""
BEND = 1.25
"""A point off the fitted line by more than this factor has left it."""
STRAIGHT = ("L", "P/E")
"""Axes along which the same work is done more often."""
_AXES = {
    "L": "layers L (256 experts, 512 replicas, 64 GPUs)",
    "E": "experts E (16 layers, 2 E replicas, 64 GPUs)",
    "P/E": "replicas an expert P/E (16 layers, 256 experts, 64 GPUs)",
    "D": "GPUs D (16 layers, 1024 experts, 2048 replicas)",
}


def sweeps() -> dict[Axis, list[tuple[float, Case]]]:
    """Of each axis the points (value, case), ascending; all plan globally, on log-normal loads."""
    return {
        "L": [(layers, _case(layers, 256, 512, 64)) for layers in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
        "E": [(experts, _case(16, experts, 2 * experts, 64)) for experts in (64, 128, 256, 512, 1024, 2048)],
        "P/E": [(ratio, _case(16, 256, int(256 * ratio), 64)) for ratio in (1, 1.25, 1.5, 2, 3, 4)],
        "D": [(gpus, _case(16, 1024, 2048, gpus)) for gpus in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)],
    }


def _case(layers: int, experts: int, replicas: int, gpus: int) -> Case:
    return Case(
        f"{layers}x{experts}-{replicas}-{gpus}",
        layers,
        experts,
        Topology(num_replicas=replicas, num_gpus=gpus),
        "drift",
        1,
    )


def fit(values: Sequence[float], milliseconds: Sequence[float], usable: Sequence[bool]) -> dict[str, Any]:
    """The straight line, on log axes, through the upper half of the usable points, and the points that are off it.

    Args:
        values: ascending.
        milliseconds: at each value.
        usable: whether a point may count for the line: one slot a GPU leaves nothing to pack, so it is off any line.

    Returns:
        `exponent` and `ms_at_1` of time = ms_at_1 · value^exponent by least squares of the logarithms;
        `fitted_from` and `fitted_to`: the values that counted; `off_line`: [value, measured / fitted] of every point
        off by more than `BEND` either way.
    """
    x, y = np.log(np.asarray(values, float)), np.log(np.asarray(milliseconds, float))
    counted = np.flatnonzero(usable)
    counted = counted[len(counted) // 2 :]
    exponent, offset = np.polyfit(x[counted], y[counted], 1)
    ratio = np.exp(y - (exponent * x + offset))
    off = [[value, float(r)] for value, r in zip(values, ratio, strict=True) if not 1 / BEND <= r <= BEND]
    ends = {"fitted_from": values[counted[0]], "fitted_to": values[counted[-1]]}
    return {"exponent": float(exponent), "ms_at_1": float(np.exp(offset)), **ends, "off_line": off}


def curves(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values, median times and fit of each planner measured at four points at least that leave something to pack."""
    found = {}
    for name in dict.fromkeys(name for point in points for name in point["results"]):
        mine = [point for point in points if name in point["results"]]
        values = [point["value"] for point in mine]
        medians = [point["results"][name]["median_ms"] for point in mine]
        packs = [point["case"]["topology"]["num_replicas"] > point["case"]["topology"]["num_gpus"] for point in mine]
        if sum(packs) >= 4:
            found[name] = {"values": values, "median_ms": medians, **fit(values, medians, packs)}
    return found


def measure_point(
    case: Case, value: float, planners: Sequence[Planner], seconds: float, skips: list[Skip]
) -> dict[str, Any]:
    """Times of the planners at one point, on the first three windows of its loads."""
    loads = series(case)[: measure.MIN_ROUNDS]
    calls = {planner.name: [planner.bind(window, case.topology) for window in loads] for planner in planners}
    timings = measure.interleave(calls, seconds)
    skips += [Skip(name, timing.error, case.name) for name, timing in timings.items() if timing.error]
    times = {name: timing.milliseconds for name, timing in timings.items() if not timing.error}
    summaries = {
        name: {"milliseconds": milliseconds, **measure.summary(milliseconds, times.get(VLLM, ()))}
        for name, milliseconds in times.items()
    }
    return {"value": value, "case": asdict(case), "results": summaries}


def table(result: dict[str, Any]) -> str:
    """Fitted exponents, and where each planner leaves its straight line."""
    rows = []
    for axis, sweep in result["axes"].items():
        for name, curve in sweep["curves"].items():
            values = curve["values"]
            ends = [f"{tables.milliseconds(curve['median_ms'][at])} ms" for at in (0, -1)]
            off = ", ".join(f"{value:g} ({ratio:.2g}×)" for value, ratio in curve["off_line"]) or "nowhere"
            span = f"{values[0]:g} to {values[-1]:g}"
            straight = _straight(values, curve["median_ms"]) if axis in STRAIGHT else "–"
            rows.append([axis, f"`{name}`", span, " to ".join(ends), f"{curve['exponent']:.2f}", off, straight])
    header = ["axis", "planner", "range", "time", "exponent", "off it at (measured / fitted)", "constant + slope"]
    note = (
        "Exponent: of time ∝ axis^exponent, least squares on log axes over the upper half of the points. "
        f"Off it: by more than {result['bend']:g} times either way. "
        "Constant + slope: time = constant + slope · axis, least squares of the relative error over all points, "
        "and the largest error."
    )
    return tables.with_skips(result, f"{tables.table(header, rows)}\n\n{note}")


def _straight(values: Sequence[float], medians: Sequence[float]) -> str:
    times = np.asarray(medians)
    slope, constant = np.polyfit(values, times, 1, w=1 / times)
    error = np.abs((constant + slope * np.asarray(values)) / times - 1).max()
    return f"{tables.milliseconds(constant)} + {tables.milliseconds(slope)} ms, within {error:.0%}"


def picture(result: dict[str, Any], path: Path) -> None:
    """Time against layers, experts, replicas and GPUs, with the fitted lines, dotted where they were not fitted."""
    at = result["environment"]
    sweeps = result["axes"]
    columns = min(2, len(sweeps))
    deep = -(-len(sweeps) // columns)
    subtitle = f"{at['cpu']}, {at['cores']} cores, {at['date'][:10]}"
    made = style.figure(7.5 * columns, 5 * deep, "What one plan costs as things grow", subtitle)
    grid = list(made.subplots(deep, columns, squeeze=False).flat)
    for axes, (axis, sweep) in zip(grid, sweeps.items(), strict=False):
        points = {}
        for name, curve in sweep["curves"].items():
            colour, marker = style.look(name)
            x, y = np.array(curve["values"]), np.array(curve["median_ms"])
            line = curve["ms_at_1"] * x ** curve["exponent"]
            fitted = (x >= curve["fitted_from"]) & (x <= curve["fitted_to"])
            axes.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white")
            axes.plot(x, line, color=colour, linewidth=0.8, linestyle=":")
            axes.plot(x[fitted], line[fitted], color=colour, linewidth=1.6)
            power = f"{'(P/E)' if axis == 'P/E' else axis}^{{{curve['exponent']:.2f}}}"
            points[rf"{name}  $\propto {power}$"] = (float(x[-1]), float(y[-1]), colour)
        axes.set_xscale("log", base=2)
        values = next(iter(sweep["curves"].values()))["values"] if sweep["curves"] else []
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        style.log_time(axes, "y")
        axes.set_xlabel(_AXES[axis])
        axes.set_ylabel("median time of one plan")
        style.tidy(axes)
        made.canvas.draw()
        style.label_right(axes, points, fontsize=10)
    for axes in grid[len(sweeps) :]:
        axes.remove()
    style.save(made, path)


@click.command()
@click.option("--planners", default=PLANNERS, show_default=True, help="names or globs")
@click.option("--axes", default="", help="of L, E, P/E, D; all")
@click.option("--seconds", default=0.3, show_default=True, help="time of a planner at a point, at least 3 rounds")
@click.option("--threads", default=1, show_default=True, help="of PyTorch: curves of work, not of how it is shared")
@click.option("--out", type=click.Path(path_type=Path), help="folder of the results")
def main(planners: str, axes: str, seconds: float, threads: int, out: Path | None) -> None:
    """Cost curves of the published algorithm in L, E, P/E and D."""
    torch.set_num_threads(threads)
    found = environment("bench.studies.scale")
    loaded, skips = peers()
    working, broken = probe([planner for planner in [*ours(), *loaded] if planner.algorithm == PUBLISHED])
    names = [planner.name for planner in working]
    wanted = [pattern for pattern in planners.split(",") if _matches(pattern, names)]
    chosen = [planner for planner in working if planner.name in select(",".join(wanted), names, "planner")]
    points_of = sweeps()
    selected = [axis for axis in points_of if axis in select(axes, points_of, "axis")]
    measured: dict[str, Any] = {}
    with Steps(sum(len(points_of[axis]) for axis in selected)) as steps:
        for axis in selected:
            points = []
            for value, case in points_of[axis]:
                steps.begin(f"{axis} = {value:g}")
                points.append(measure_point(case, value, chosen, seconds, skips))
            measured[axis] = {"points": points, "curves": curves(points)}
    body = {"bend": BEND, "skipped": [asdict(skip) for skip in [*skips, *broken]], "axes": measured}
    results.publish("scale", found, body, out)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    try:
        return bool(select(pattern, names, "planner"))
    except ValueError:
        return False  # a default pattern may name a peer that was not fetched


if __name__ == "__main__":
    main()
