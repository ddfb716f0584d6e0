"""Pictures of a comparison."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from eplb_triton.cli.study import Outcome
from eplb_triton.formats import write_whole

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which people with any common colour blindness can tell apart, brown in place of their yellow;
# a marker each besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")
_UNPLANNED = "#555555"


def draw(path: Path, title: str, weight: Tensor, outcomes: Sequence[Outcome]) -> None:
    """Draw GPU loads and balancedness per layer, before and after, to a file that is complete or not there.

    Args:
        path: a name that ends in one of `SUFFIXES`.
        title: above everything.
        weight: [L, E], the loads of the last window.
        outcomes: no planning first, then every policy; their last placement is drawn.

    Raises:
        FormatError: the file cannot be written.
    """
    placements = {outcome.policy: outcome.placement for outcome in outcomes if outcome.placement is not None}
    balancedness = {
        policy: placement.balancedness(weight, per_layer=True).numpy() for policy, placement in placements.items()
    }
    unplanned, *planned = placements
    worst = int(balancedness[unplanned].argmin())
    loads = {policy: placement.gpu_loads(weight)[worst].numpy() for policy, placement in placements.items()}
    styles = dict(zip(planned, _styles(), strict=False))

    figure = Figure(figsize=(13, 5.5 + 0.5 * len(planned)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, parse_math=False)
    # Parts of their own, so that the long names of policies do not push the upper pictures to the right.
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.5, 0.5 + 0.5 * len(planned)))
    upper, lower = parts
    left, right = upper.subplots(1, 2)
    _gpu_loads(left, loads, styles, worst)
    _layers(right, balancedness, styles)
    _above_bound(lower.subplots(), {outcome.policy: outcome.gaps[-1].numpy() for outcome in outcomes[1:]}, styles)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter of a file's name that the font lacks
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=130)
    write_whole(path, file.getvalue())


def _gpu_loads(axes: Axes, loads: dict[str, Any], styles: dict[str, Any], layer: int) -> None:
    """The GPUs of one layer, sorted by what they carry."""
    sorted_loads = {policy: np.sort(gpus)[::-1] / (gpus.mean() or 1) for policy, gpus in loads.items()}
    _before_and_after(axes, sorted_loads, styles, first=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":", label="mean load: nothing can be better")
    _tidy(axes, f"GPU loads of layer {layer}, the worst one before")
    axes.set(xlabel="GPUs, busiest first", ylabel="load of the GPU / mean load")


def _layers(axes: Axes, balancedness: dict[str, Any], styles: dict[str, Any]) -> None:
    """Every layer's balancedness."""
    _before_and_after(axes, balancedness, styles, first=0)
    _tidy(axes, "Balancedness of every layer, 1 is perfect")
    axes.set(xlabel="layer", ylabel="mean GPU load / max GPU load")


def _before_and_after(axes: Axes, curves: dict[str, Any], styles: dict[str, Any], first: int) -> None:
    """The unplanned curve, filled, and one line a policy; counted along x from `first`."""
    for policy, curve in curves.items():
        at = np.arange(first, first + len(curve))
        if policy in styles:
            axes.plot(at, curve, label=policy, linewidth=1.2, markersize=3.5, **styles[policy])
        else:
            axes.fill_between(at, curve, color=_UNPLANNED, alpha=0.15, linewidth=0)
            axes.plot(at, curve, color=_UNPLANNED, linewidth=1.8, label=policy)
    axes.set_ylim(bottom=0)


def _above_bound(axes: Axes, gaps: dict[str, Any], styles: dict[str, Any]) -> None:
    """What each policy gives away, in the unit of the tables: the lines above lie on each other, the gaps do not."""
    for row, (policy, layers) in enumerate(gaps.items()):
        percent = layers * 100  # [L]
        jitter = (np.arange(len(percent)) * 0.618 % 1 - 0.5) * 0.5  # so that equal layers do not hide each other
        style = styles[policy]
        axes.plot(percent, row + jitter, linestyle="", markersize=5, alpha=0.6, **style)
        axes.plot([percent.mean()] * 2, [row - 0.4, row + 0.4], color=style["color"], linewidth=3)
        axes.annotate(
            f"mean {percent.mean():.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    axes.set_yticks(range(len(gaps)), list(gaps))
    axes.set_ylim(len(gaps) - 0.5, -0.5)
    axes.set_xlim(left=min(-0.02, axes.get_xlim()[0]))
    axes.set_xlabel("gap to the lower bound in % (a mark a layer, a bar the mean)")
    _tidy(axes, "How far each policy is above the lower bound, which no plan can beat", integers=False)


def _tidy(axes: Axes, title: str, *, integers: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _styles() -> Iterator[dict[str, Any]]:
    """A colour and a marker a policy; nine markers to eight colours, so no pair comes twice in 72 policies."""
    for colour, marker in zip(cycle(_COLOURS), cycle(_MARKERS), strict=False):
        yield {"color": colour, "marker": marker}
