"""Pictures of the studies: cost curves, the next window of a trace, and the gap to the lower bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench import style
from bench.planners.ours import PUBLISHED

Result = dict[str, Any]

_AXES = {
    "L": "layers L (256 experts, 512 replicas, 64 GPUs)",
    "E": "experts E (16 layers, 2 E replicas, 64 GPUs)",
    "P/E": "replicas an expert P/E (16 layers, 256 experts, 64 GPUs)",
    "D": "GPUs D (16 layers, 1024 experts, 2048 replicas)",
}
_SMALLEST_GAP = 1e-6
"""A smaller one is drawn here: a logarithmic axis has no zero."""


def scale(result: Result, path: Path) -> None:
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


def next_window(result: Result, path: Path) -> None:
    """Balancedness on the planned window, and on the next one of the same and of another domain."""
    rows = result["rows"]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    planners = list(dict.fromkeys(row["planner"] for row in rows))
    made = style.figure(5.0 * len(tokens) + 1.5, 1.8 + 0.42 * len(planners), "A plan meets the next window")
    panels = made.subplots(1, len(tokens), sharey=True, sharex=True, squeeze=False)[0]
    looks = {
        "on the window it was made for": ("within", "planned", "o", "white"),
        "on the next window, same domain": ("within", "following", "o", None),
        "on the next window, other domain": ("across", "following", "X", None),
    }
    for axes, size in zip(panels, tokens, strict=True):
        for row in (row for row in rows if row["tokens"] == size):
            height = planners.index(row["planner"])
            colour, _ = style.look(row["planner"])
            means = [row[kind][key]["mean"] for kind, key, _, _ in looks.values() if kind in row]
            axes.plot([min(means), max(means)], [height, height], color=colour, alpha=0.35)
            for kind, key, marker, face in looks.values():
                if kind in row:
                    mean = row[kind][key]["mean"]
                    axes.plot(mean, height, marker, color=colour, markersize=8, markerfacecolor=face or colour)
        axes.set_xlabel("balancedness (1 is perfect)")
        style.tidy(axes, f"windows of {size} tokens")
    panels[0].set_yticks(range(len(planners)), planners)
    panels[0].set_ylim(len(planners) - 0.5, -0.5)
    handles = [
        panels[0].plot(
            [], [], marker, color=style.PLAIN, markersize=8, markerfacecolor=face or style.PLAIN, label=text
        )[0]
        for text, (_, _, marker, face) in looks.items()
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    style.save(made, path)


def gap(result: Result, path: Path) -> None:
    """Mean gap to the lower bound of every policy, a line a case, and what the default policy promises."""
    at, cases, efforts = result["environment"], result["cases"], result["efforts"]
    others = ("other published policies", "#E69F00", "o", 5)
    looks = {  # from the bottom to the top: where points meet, each leaves something of the one below in sight
        PUBLISHED: (PUBLISHED, "#D55E00", "s", 9),
        "": others,
        efforts["low"]: ("effort low", "#56B4E9", "^", 12),
        efforts["high"]: ("effort high", "#009E73", "D", 10),
        efforts["medium"]: (efforts["medium"], "#0072B2", "o", 9),
    }
    title = "How far the heaviest GPU is above what no placement can beat"
    made = style.figure(11, 2.0 + 0.42 * len(cases), title, f"{at['cpu']}, {at['cores']} cores, {at['date'][:10]}")
    axes = made.add_subplot()
    points: dict[tuple[str, str, str, int], list[tuple[float, int]]] = {kind: [] for kind in looks.values()}
    for height, row in enumerate(cases):
        gaps = {name: max(found["mean_gap"], _SMALLEST_GAP) for name, found in row["policies"].items()}
        axes.plot([min(gaps.values()), max(gaps.values())], [height, height], color=style.PLAIN, alpha=0.3, linewidth=1)
        for name, mean in gaps.items():
            points[looks.get(name, others)].append((mean, height))
    for (label, colour, marker, size), found in points.items():
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white", label=label)
    promised = [row["promised"] for row in cases]
    label = f"promised for {efforts['medium']}"
    axes.plot(promised, range(len(cases)), "|", color=style.PLAIN, markersize=16, markeredgewidth=1.6, label=label)
    axes.set_yticks(range(len(cases)), [row["case"]["name"] for row in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("gap to the lower bound, mean over the layers (less is better)")
    style.tidy(axes)
    made.legend(loc="outside lower center", ncols=3, frameon=False)
    style.save(made, path)
