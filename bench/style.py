"""How the pictures look: colours that colour-blind people can tell apart, labels that keep clear of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours. Ours are blue, green and violet, peers orange and grey.
_PEERS = {
    "vllm": ("#D55E00", "s"),
    "sglang": ("#E69F00", "D"),
    "sglang-vec": ("#8C6D1F", "v"),
    "vllm-ascend": ("#7F7F7F", "X"),
}
_BACKENDS = {"cpu": ("#0072B2", "o"), "triton": ("#009E73", "P"), "reference": ("#56B4E9", "^")}
_OTHER = ("#CC79A7", "*")
PLAIN = "#555555"
UNPLANNED = "experts in order"


def look(planner: str) -> tuple[str, str]:
    """Colour and marker of a planner, the same in every picture."""
    if planner == UNPLANNED:
        return PLAIN, "o"
    return _PEERS.get(planner) or _BACKENDS.get(planner.partition("@")[2], _OTHER)


def figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """An empty figure, sized in inches, that needs no display."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(f"{title}\n{subtitle}" if subtitle else title, fontsize=13)
    return made


def save(made: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    made.savefig(path, dpi=130, metadata={"Software": None})


def tidy(axes: Axes, title: str = "") -> None:
    """Light grid, no frame on top and right."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_time(axes: Axes, which: str) -> None:
    """A logarithmic time axis in plain numbers: 0.1 ms, 10 ms, 1 s."""
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axis.set_minor_formatter(NullFormatter())


def duration(milliseconds: float) -> str:
    """10 µs, 3.2 ms, 1.5 s."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    return f"{milliseconds * 1000:.3g} µs" if milliseconds < 0.1 else f"{milliseconds:.3g} ms"


def spread(positions: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed to be `apart` from each other within low..high, their order kept."""
    order = sorted(range(len(positions)), key=lambda at: positions[at])
    apart = min(apart, (high - low) / max(1, len(positions) - 1))
    placed = list(positions)
    floor = low
    for at in order:
        placed[at] = floor = max(placed[at], floor)
        floor += apart
    ceiling = high
    for at in reversed(order):
        placed[at] = ceiling = min(placed[at], ceiling)
        ceiling -= apart
    return placed


def label_right(axes: Axes, points: Mapping[str, tuple[float, float, str]], fontsize: float = 8.5) -> None:
    """Write each text right of the axes, at the height of its point (x, y, colour), with a thin line to the point.

    Call it when the limits of the axes are final.
    """
    across = axes.transAxes.inverted()
    at = {text: across.transform(axes.transData.transform((x, y))) for text, (x, y, _) in points.items()}
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    apart = 1.55 * fontsize / height
    heights = spread([float(point[1]) for point in at.values()], apart, 0.0, 1.0)
    for (text, (x, y, colour)), label_y in zip(points.items(), heights, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, label_y),
            textcoords="axes fraction",
            va="center",
            fontsize=fontsize,
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
