"""The tables and the picture of the serving simulation, from its rows alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench import style
from bench.serving_planners import KEPT
from bench.serving_rules import scores
from bench.tables import table
from eplb_triton import POLICIES

Rows = Sequence[dict[str, Any]]
Scores = Mapping[tuple[str, int], float]
MARKERS = ("o", "s", "^")
COLOURS = {"steady": "#0072B2", "balanced": "#009E73", "deepseek": "#CC79A7"}
"""Of our policies that users choose by name, and their renumbered plans; the other policies are grey."""
NOTES = """\
Score: time of `deepseek` planning every 1024 steps / time of the planner, times 100; a kind's cases count alike, R1,
Mix and Qwen3 3 : 1 : 3. Drawn: {layers} layers, seeds {seeds}. PAR, slots written in 6,144 steps, and ms a plan (of
the layers drawn, on one thread, with other work beside it) are means over cases and seeds, by interval as the scores.
Planning itself takes no time in the simulation. `+previous`: a plan renumbered, so that weights stay where they can.
Peers get what their frameworks give them: `vllm` and `vllm-ascend` the placement in force too."""
MADE = "By `{command}`, {date:.10}, {cores}-core {cpu}, commit {commit!s:.10}: {cpu_seconds} s of CPU.{peers}"


def report(body: Mapping[str, Any]) -> str:
    """Scores by planner and interval, those of `steady` by seed, recorded traffic, and who took no part; Markdown."""
    rows, traces = body["rows"], body["traces"]
    parts = [_scores(rows)]
    if any(row["planner"] == "steady" for row in rows):
        parts.append(_by_seed([row for row in rows if row["planner"] in ("deepseek", "steady")], "steady"))
    layers, seeds = (_listed(sorted({row[of] for row in rows})) for of in ("layers", "seed"))
    parts.append(_filled(NOTES.format(layers=layers, seeds=seeds)))
    about = body["environment"]
    parts.append(_filled(MADE.format(**about | {"peers": _versions(about["peers"])})))
    for steps in dict.fromkeys(row["steps"] for row in traces):
        parts.append(_recorded([row for row in traces if row["steps"] == steps], steps))
    if body["skipped"]:
        lines = (f"* `{skip['planner']}`{_where(skip['case'])}: {skip['reason']}" for skip in body["skipped"])
        parts.append("\n".join(["Took no part:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _listed(values: Sequence[int]) -> str:
    *others, last = (str(value) for value in values)
    return f"{', '.join(others)} and {last}" if others else last


def _versions(peers: Mapping[str, Any]) -> str:
    return f" Peers: {', '.join(name + ' ' + peer['version'] for name, peer in peers.items())}." if peers else ""


def _where(case: str) -> str:
    return f", {case}" if case else ""


def _scores(rows: Rows) -> str:
    found = scores(rows)
    intervals = _intervals(found)
    head = [*(f"every {interval} steps" for interval in intervals), "PAR", "slots", "ms a plan"]
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        means = [_means(rows, name, at) for at in intervals if (name, at) in found]
        shown = [" / ".join(f"{mean[k]:{form}}" for mean in means) for k, form in enumerate((".3f", ",.0f", ".1f"))]
        lines.append([f"`{name}`", *_cells(found, name, intervals), *shown])
    return table(["planner", *head], lines)


def _by_seed(rows: Rows, name: str) -> str:
    readings = {"times of a kind summed": scores(rows, summed=True), "weights by case": scores(rows, by_case=True)}
    intervals = _intervals(scores(rows))
    lines = [[reading, *_cells(found, name, intervals)] for reading, found in readings.items()]
    for seed in dict.fromkeys(row["seed"] for row in rows):
        alone = scores([row for row in rows if row["seed"] == seed])
        lines.append([f"seed {seed}", *_cells(alone, name, intervals)])
    return table([f"`{name}`", *(f"every {interval} steps" for interval in intervals)], lines)


def _intervals(found: Scores) -> list[int]:
    return sorted({at for _, at in found}, reverse=True)


def _cells(found: Scores, name: str, intervals: Sequence[int]) -> list[str]:
    return [f"{found[name, at]:.1f}" if (name, at) in found else "–" for at in intervals]


def _recorded(rows: Rows, steps: str) -> str:
    """A line a planner, a column a trace: balancedness of the next window, slots written a layer and plan."""
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    cells = {(row["planner"], row["trace"]): f"{row['balancedness']:.3f}, {row['slots']:.1f}" for row in rows}
    names = dict.fromkeys(row["planner"] for row in rows)
    lines = [[f"`{name}`", *(cells[name, trace] for trace in traces)] for name in names]
    title = f"Recorded traffic, {steps}: balancedness of the next window, slots written a layer and plan"
    return f"{title}\n\n{table(['planner', *traces], lines)}"


def _means(rows: Rows, name: str, interval: int) -> list[float]:
    """PAR, slots and ms a plan, means over cases and seeds."""
    chosen = [row for row in rows if (row["planner"], row["interval"]) == (name, interval)]
    return [statistics.fmean(row[value] for row in chosen) for value in ("par", "slots", "plan_ms")]


def picture(rows: Rows, path: Path) -> None:
    """PAR against slots written: a point a planner and interval, means over cases and seeds."""
    found = scores(rows)
    markers = dict(zip(_intervals(found), MARKERS, strict=False))
    plot = style.figure(10, 6.5, "The busiest GPU against the weights moved", "means over cases and seeds")
    axes = plot.add_subplot()
    last = {}
    for name in dict.fromkeys(name for name, _ in found):
        colour = _colour(name)
        points = {marker: _means(rows, name, at)[1::-1] for at, marker in markers.items() if (name, at) in found}
        axes.plot(*zip(*points.values(), strict=True), ":" if name.endswith(KEPT) else "-", color=colour, linewidth=1.2)
        for marker, (slots, par) in points.items():
            axes.plot(slots, par, marker, color=colour, markersize=7, markeredgecolor="white", zorder=3)
            last[name] = slots, par, colour
    axes.set(xlabel="slots written in 6,144 steps", ylabel="PAR: largest / mean GPU load of a step")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda slots, _: f"{slots:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.08)
    style.tidy(axes)
    shapes = [
        Line2D([], [], color=style.PLAIN, marker=marker, linestyle="", label=f"a plan every {interval} steps")
        for interval, marker in markers.items()
    ]
    axes.legend(handles=shapes, frameon=False, loc="upper right")
    plot.canvas.draw()
    style.label_right(axes, last)
    style.save(plot, path)


def _colour(name: str) -> str:
    policy = name.removesuffix(KEPT)
    return COLOURS.get(policy) or (style.PLAIN if policy in POLICIES else style.look(name)[0])
