"""The pictures of a report: SVG that stands in a page, in colours that the page names."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eplb_triton.cli.replay_study import FORESIGHT, KEPT, UNPLANNED, Outcome
from eplb_triton.cli.replay_tables import label
from eplb_triton.replay import EVEN, IN_STEP

# Stand-ins that no picture uses otherwise: a page may be dark or light, and says what they are.
INK, GRID = "#010101", "#020202"
_COLOURS = tuple(f"#03000{number}" for number in range(1, 9))
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(_COLOURS, 1)
}
_ROLES = {
    UNPLANNED: 0,
    "steady": 1,
    "deepseek": 2,
    "balanced": 3,
    "steady" + KEPT: 4,
    "balanced" + KEPT: 7,
    FORESIGHT: 5,
}
_DASHES = {UNPLANNED: (0, (1, 1)), FORESIGHT: (0, (5, 2))}
_KEPT = (0, (3, 1, 1, 1))
WIDTH = 6.6  # inches: at 10 points a line of text stays readable on a telephone
_LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "eplb_triton",
}


def par_over_time(outcomes: Sequence[Outcome], best: Outcome, num_steps: int) -> str:
    """PAR of every deployment, and of the best one with tokens split in the step."""
    with mpl.rc_context(_LOOK):
        figure, axes = _figure(3.1)
        at = _times(best, num_steps)
        for outcome in outcomes:
            axes.plot(at, outcome.tallies[EVEN].over_time, label=label(outcome), **_line(outcome))
        split = best.tallies[IN_STEP].over_time
        axes.plot(at, split, label=f"{label(best)}, split in the step", color=_COLOURS[6], linewidth=1.2)
        axes.set(xlabel="step", ylabel="busiest GPU / mean", ylim=(1, None))
        return _svg(figure, axes, "a")


def slots_over_time(outcomes: Sequence[Outcome], num_steps: int) -> str:
    """Slots written since the beginning, of the deployments that plan."""
    with mpl.rc_context(_LOOK):
        figure, axes = _figure(2.7)
        for outcome in outcomes:
            if outcome.name not in (UNPLANNED, FORESIGHT):
                written = outcome.slots.cumsum()
                axes.step(_times(outcome, num_steps), written, where="post", label=label(outcome), **_line(outcome))
        axes.set(xlabel="step", ylabel="slots written so far", ylim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return _svg(figure, axes, "b")


def heat_of_layer(before: Outcome, after: Outcome, layer: int, num_steps: int) -> str:
    """Load of every GPU of one layer over time, before and after, in one scale."""
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        upper, lower = figure.subplots(1, 2, sharey=True)
        heats = [outcome.tallies[EVEN].heat_of(layer) for outcome in (before, after)]
        low, high = min(heat.min() for heat in heats), max(heat.max() for heat in heats)
        for axes, heat, outcome in zip((upper, lower), heats, (before, after), strict=True):
            drawn = axes.imshow(
                heat,
                aspect="auto",
                origin="lower",
                vmin=low,
                vmax=high,
                cmap="viridis",
                interpolation="nearest",
                extent=(0, num_steps, -0.5, len(heat) - 0.5),
            )
            axes.set_title(label(outcome), fontsize=9.5, loc="left")
            axes.set_xlabel("step")
            axes.grid(visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        upper.set_ylabel(f"GPU, layer {layer}")
        upper.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(drawn, ax=[upper, lower], label="load / mean", pad=0.02)
        return _svg(figure, None, "c")


def layers(before: Outcome, after: Outcome) -> str:
    """PAR of every layer before and after; what lies between them is the gain."""
    with mpl.rc_context(_LOOK):
        figure, axes = _figure(2.7)
        old, new = before.tallies[EVEN].layers, after.tallies[EVEN].layers
        at = np.arange(len(old))
        axes.vlines(at, new, old, color=GRID, linewidth=1.2)
        axes.plot(at, old, "o", markersize=4, color=_COLOURS[_ROLES[UNPLANNED]], label=label(before))
        axes.plot(at, new, "o", markersize=4, color=_colour(after), label=label(after))
        axes.set(xlabel="layer", ylabel="busiest GPU / mean", ylim=(1, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, axes, "d")


def redundancy(sweep: Sequence[Outcome], chosen: Outcome, num_experts: int) -> str:
    """PAR against redundant experts, a line for every policy and interval."""
    with mpl.rc_context(_LOOK):
        figure, axes = _figure(2.7)
        intervals = sorted({outcome.setting.interval for outcome in sweep})
        for name in dict.fromkeys(outcome.name for outcome in sweep):
            for number, interval in enumerate(intervals):
                line = [o for o in sweep if (o.name, o.setting.interval) == (name, interval)]
                at = [outcome.setting.topology.num_replicas - num_experts for outcome in line]
                text = f"{label(line[0])}, every {interval:,}" if len(intervals) > 1 else label(line[0])
                style = {**_line(line[0]), "linestyle": ("-", "--", ":", "-.")[number % 4]}
                axes.plot(at, [o.tallies[EVEN].mean for o in line], marker="o", markersize=4, label=text, **style)
        at_chosen = chosen.setting.topology.num_replicas - num_experts
        axes.plot(at_chosen, chosen.tallies[EVEN].mean, "o", markersize=11, fillstyle="none", color=INK, label="chosen")
        axes.set(xlabel="redundant experts", ylabel="busiest GPU / mean")
        axes.set_xticks(sorted({outcome.setting.topology.num_replicas - num_experts for outcome in sweep}))
        return _svg(figure, axes, "e")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _times(outcome: Outcome, num_steps: int) -> Any:
    """The middle of every part of time, in steps."""
    buckets = outcome.tallies[EVEN].buckets
    return (np.arange(buckets) + 0.5) * num_steps / buckets


def _colour(outcome: Outcome) -> str:
    return _COLOURS[_ROLES.get(outcome.name, 7)]


def _line(outcome: Outcome) -> dict[str, Any]:
    dashes = _KEPT if outcome.name.endswith(KEPT) else _DASHES.get(outcome.name, "-")
    return {"color": _colour(outcome), "linestyle": dashes, "linewidth": 1.5}


def _svg(figure: Figure, axes: Axes | None, name: str) -> str:
    """The picture as an element for a page: transparent, as wide as there is room, with ids of its own."""
    if axes is not None:
        handles, _ = axes.get_legend_handles_labels()
        figure.legend(loc="outside upper left", ncols=min(3, len(handles)), fontsize=9)
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    )
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()
