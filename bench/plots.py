"""Pictures of a run over the cases, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from bench import style
from bench.planners.ours import PUBLISHED, SOURCE
from bench.planners.peers import VLLM
from bench.tables import machine

Result = dict[str, Any]

_BALANCE_CASES = ("v3-hierarchical", "v3-global", "kimi-k2", "trace-law")


def _subtitle(result: Result) -> str:
    at = result["environment"]
    return f"{machine(result).partition(', ')[0]}, {at['cores']} cores, {at['date'][:10]}"


def time_by_case(result: Result, path: Path) -> None:
    """Median time of every planner of the published algorithm, and of peers, a line a case."""
    about = result["planners"]
    names = [name for name in about if about[name]["algorithm"] == PUBLISHED or about[name]["source"] != SOURCE]
    cases = [row for row in result["cases"] if any(name in row["results"] for name in names)]
    made = style.figure(11, 2.0 + 0.42 * len(cases), "Time of one plan, all layers", _subtitle(result))
    axes = made.add_subplot()
    for at, row in enumerate(cases):
        medians = {name: row["results"][name]["median_ms"] for name in names if name in row["results"]}
        axes.plot([min(medians.values()), max(medians.values())], [at, at], color=style.PLAIN, alpha=0.3, linewidth=1)
        ours = [name for name in medians if about[name]["source"] == SOURCE]
        if ours and VLLM in medians:
            ratio = row["results"][min(ours, key=medians.__getitem__)]["times_as_fast"]
            _beside(axes, f"{ratio:.1f}×", at, fontweight="bold")
    for name in names:
        points = [(row["results"][name], at) for at, row in enumerate(cases) if name in row["results"]]
        if points:
            _times(axes, name, points)
    axes.set_yticks(range(len(cases)), [row["case"]["name"] for row in cases])
    axes.set_ylim(len(cases) - 0.5, -0.8)
    style.log_time(axes, "x")
    axes.set_xlabel("median, with 10th to 90th percentile")
    if any(VLLM in row["results"] for row in cases):
        _beside(axes, "ours vs\nvLLM", -1, fontsize=9)
    style.tidy(axes)
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    style.save(made, path)


def _beside(axes: Axes, text: str, height: float, **how: Any) -> None:
    axes.annotate(text, (1.02, height), xycoords=("axes fraction", "data"), va="center", **how)


def _times(axes: Axes, name: str, points: Sequence[tuple[Result, int]]) -> None:
    """One planner's medians and percentiles, at the height of each case."""
    colour, marker = style.look(name)
    low, middle, high = (np.array([found[key] for found, _ in points]) for key in ("p10_ms", "median_ms", "p90_ms"))
    spread = np.stack([middle - low, high - middle]).clip(0)
    heights = [at for _, at in points]
    axes.errorbar(middle, heights, xerr=spread, fmt=marker, color=colour, markersize=7, linewidth=1, label=name)


def balance_and_time(result: Result, path: Path) -> None:
    """Balancedness against time of every planner, a panel a case."""
    rows = {row["case"]["name"]: row for row in result["cases"] if row["results"]}
    chosen = [name for name in _BALANCE_CASES if name in rows] or list(rows)[:4]
    if not chosen:
        return
    columns = min(2, len(chosen))
    deep = -(-len(chosen) // columns)
    title = "Balancedness of the planned window, and what the plan costs"
    made = style.figure(8.2 * columns, 0.8 + 4.2 * deep, title, _subtitle(result))
    grid = made.subplots(deep, columns, squeeze=False).flat
    for axes, name in zip(grid, chosen, strict=False):
        found = _one_a_plan(result, rows[name]["results"])
        points = {}
        for planner, figures in found.items():
            colour, marker = style.look(planner)
            x, y = figures["median_ms"], statistics.fmean(figures["balancedness"])
            axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="white")
            points[planner] = (x, y, colour)
        unplanned = statistics.fmean(rows[name]["unplanned"]["balancedness"])
        style.log_time(axes, "x")
        axes.set_xlabel("median time of one plan (less is better)")
        axes.set_ylabel("balancedness (1 is perfect)")
        axes.margins(0.08)
        style.tidy(axes, f"{name} (experts in order: {unplanned:.3f})")
        made.canvas.draw()
        style.label_right(axes, points)
    for axes in list(grid)[len(chosen) :]:
        axes.remove()
    made.supxlabel(result["balancedness"], fontsize=9)
    style.save(made, path)


def _one_a_plan(result: Result, found: Result) -> Result:
    """The fastest backend of each policy, and every peer."""
    best: dict[str, str] = {}
    for name, figures in found.items():
        about = result["planners"][name]
        key = about["algorithm"] if about["source"] == SOURCE else name
        if key not in best or figures["median_ms"] < found[best[key]]["median_ms"]:
            best[key] = name
    return {name: found[name] for name in best.values()}


def gpu_loads(result: Result, path: Path) -> None:
    """Load of every GPU in every layer, before planning, after the published algorithm, and after our best policy."""
    row = next((row for row in result["cases"] if "gpu_loads" in row), None)
    if row is None:
        return
    loads = {name: np.array(values) for name, values in row["gpu_loads"].items()}  # [L, D] each, of the layer's mean
    ours = [name for name in row["results"] if result["planners"][name]["source"] == SOURCE]
    published = next((name for name in ours if result["planners"][name]["algorithm"] == PUBLISHED), None)
    best = max(ours, key=lambda name: row["results"][name]["balancedness"][0], default=None)
    shown = dict.fromkeys(name for name in (style.UNPLANNED, published, best) if name)
    title = f"Load of every GPU: {row['case']['name']}, first window"
    made = style.figure(4.4 * len(shown) + 1, 6.2, title, _subtitle(result))
    panels = made.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    scale = TwoSlopeNorm(1, vmin=0.4, vmax=max(1.6, float(np.percentile(loads[style.UNPLANNED], 99.5))))
    for axes, name in zip(panels, shown, strict=True):
        image = axes.imshow(loads[name], aspect="auto", cmap="PuOr_r", norm=scale, interpolation="nearest")
        heaviest = loads[name].max(1)
        short = name.partition("@")[0]
        axes.set_title(
            f"{short}\nheaviest GPU {heaviest.mean():.2f}× the mean, worst {heaviest.max():.2f}×", fontsize=10
        )
        axes.set_xlabel("GPU")
    panels[0].set_ylabel("layer")
    bar = made.colorbar(image, ax=list(panels), shrink=0.8, pad=0.01, extend="both")
    bar.set_label("load of the GPU / mean load of the layer")
    style.save(made, path)
