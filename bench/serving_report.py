"""The tables and the picture of the serving simulation, from its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench import style
from bench.serving_rules import scores
from bench.tables import table

Rows = Sequence[dict[str, Any]]
Scores = Mapping[tuple[str, int], float]
MARKERS = ("o", "s", "^")
COLOURS = {"steady": "#0072B2", "balanced": "#009E73", "deepseek": "#CC79A7"}
"""Of our policies that users choose by name, and their renumbered plans; the other policies are grey."""
NOTES = """\
Score: time of `deepseek` planning every 1024 steps / time of the planner, times 100; a kind's cases count alike, R1,
Mix and Qwen3 3 : 1 : 3. {drawn}. PAR, slots written in 6,144 steps, and ms a plan (of the layers drawn, one thread,
other work beside it) are means over cases and seeds, by interval as the scores. Planning itself takes no time in the
simulation. `+previous`: a plan renumbered, so that weights stay where they can. Peers get what their frameworks give
them: `vllm` and `vllm-ascend` the placement in force too."""


def report(body: Mapping[str, Any]) -> str:
    """Scores by planner and interval, those of `steady` by seed, recorded traffic, and who took no part; Markdown."""
    rows, traces = body["rows"], body["traces"]
    parts = [_scores(rows)]
    if any(row["planner"] == "steady" for row in rows):
        parts.append(_by_seed([row for row in rows if row["planner"] in ("deepseek", "steady")], "steady"))
    parts.append(NOTES.format(drawn=_drawn(rows)))
    for steps in dict.fromkeys(row["steps"] for row in traces):
        parts.append(_recorded([row for row in traces if row["steps"] == steps], steps))
    if body["skipped"]:
        lines = (f"* `{skip['planner']}`{_where(skip['case'])}: {skip['reason']}" for skip in body["skipped"])
        parts.append("\n".join(["Took no part:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _drawn(rows: Rows) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    layers = " or ".join(str(count) for count in sorted({row["layers"] for row in rows}))
    return f"Drawn: {layers} layers; seeds {seeds}"


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
    summed = scores(rows, summed=True)
    intervals = _intervals(summed)
    lines = [["times of a kind summed", *_cells(summed, name, intervals)]]
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
    intervals = _intervals(scores(rows))
    plot = style.figure(10, 6.5, "The busiest GPU against the weights moved", "means over cases and seeds")
    axes = plot.add_subplot()
    points = {}
    for name in dict.fromkeys(row["planner"] for row in rows):
        colour, ours = _colour(name)
        at = {interval: _means(rows, name, interval) for interval in intervals if _has(rows, name, interval)}
        axes.plot(
            [slots for _, slots, _ in at.values()],
            [par for par, _, _ in at.values()],
            ":" if name.endswith("+previous") else "-",
            color=colour,
            linewidth=1.2,
            zorder=3 if ours else 2,
        )
        for marker, interval in zip(MARKERS, intervals, strict=False):
            if interval in at:
                par, slots, _ = at[interval]
                axes.plot(slots, par, marker, color=colour, markersize=7, markeredgecolor="white", zorder=4)
        par, slots, _ = list(at.values())[-1]
        points[name] = (slots, par, colour)
    axes.set(xlabel="slots written in 6,144 steps", ylabel="PAR: largest / mean GPU load of a step")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda slots, _: f"{slots:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.08)
    style.tidy(axes)
    shapes = [
        Line2D([], [], color=style.PLAIN, marker=marker, linestyle="", label=f"a plan every {interval} steps")
        for marker, interval in zip(MARKERS, intervals, strict=False)
    ]
    axes.legend(handles=shapes, frameon=False, loc="upper right")
    plot.canvas.draw()
    style.label_right(axes, points)
    style.save(plot, path)


def _has(rows: Rows, name: str, interval: int) -> bool:
    return any((row["planner"], row["interval"]) == (name, interval) for row in rows)


def _colour(name: str) -> tuple[str, bool]:
    """Colour, and whether it is a policy that users choose by name."""
    policy = name.partition("+")[0]
    if policy in COLOURS:
        return COLOURS[policy], True
    colour, _ = style.look(name)
    return (colour, False) if colour != style.look("")[0] else (style.PLAIN, False)
