"""The tables of the commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from eplb_triton import BALANCEDNESS, POLICIES, Placement, Topology
from eplb_triton.cli import words
from eplb_triton.cli.gaps import GAP, gaps_of, percent
from eplb_triton.cli.study import Outcome, Windows, mean, median
from eplb_triton.cli.terminal import broken, say, sparkline
from eplb_triton.printing import printable

WORST_LAYERS = 5
ROOMY = 100  # below this width a comparison has no room for the names of policies beside spaced columns
LAYERS_BELOW_EACH_OTHER = 10  # fewer are not split into columns
NAME_WIDTH = 24  # of a policy over a column
LAYER_WIDTH = 34  # of a layer's number, balancedness and gap with the space around them
NOTHING = "-"
IN_ORDER = "experts in order"
BEST_STYLE, UNPLANNED_STYLE = "bold green", "dim"


@dataclass(frozen=True)
class Column:
    """A column of the comparison.

    Args:
        heading: two words, one over the other.
        explanation: the line below the table.
        value: what an outcome has there, None for nothing.
        digits: after the point; None for a gap, printed in %.
        best: which of the values is marked, `max` or `min`; None for no mark.
    """

    heading: tuple[str, str]
    explanation: str
    value: Callable[[Outcome], float | None]
    digits: int | None
    best: Callable[[Sequence[float]], float] | None = None

    def cell(self, outcome: Outcome) -> str:
        """The value as it is printed."""
        value = self.value(outcome)
        return NOTHING if value is None else self._print(value)

    def best_cell(self, outcomes: Sequence[Outcome]) -> str | None:
        """The printed value that is marked, wherever it stands: values that print alike are all marked."""
        values = [value for outcome in outcomes if (value := self.value(outcome)) is not None]
        return self._print(self.best(values)) if self.best and values else None

    def _print(self, value: float) -> str:
        return f"{value:,.{self.digits}f}" if self.digits is not None else percent(value)


def comparison_columns(windows: Windows, topology: Topology, backend: str) -> list[Column]:
    """The columns that have a meaning for these windows: the ones about change need two."""
    planned = [
        Column(("planned", "window"), "balancedness on the window that was planned", lambda o: mean(o.planned), 4, max),
        Column(
            ("mean", "gap %"),
            "gap to the lower bound on the window that was planned, mean over layers",
            lambda o: float(torch.stack(o.gaps).mean()),
            None,
            min,
        ),
        Column(
            ("worst", "gap %"),
            "that gap in the worst layer of the worst window",
            lambda o: float(torch.stack(o.gaps).max()),
            None,
            min,
        ),
    ]
    change = [
        Column(
            ("next", "window"),
            "balancedness of that plan step by step in the window after it: sum of mean / sum of max GPU loads",
            lambda o: mean(o.following),
            4,
            max,
        ),
        Column(
            ("slots", "written"),
            f"slots a layer, of {topology.num_replicas}, whose expert changes from one plan to the next",
            lambda o: mean(o.moved),
            1,
        ),
        Column(
            ("experts", "fetched"),
            "experts a layer that a GPU must fetch for that, not having held them before",
            lambda o: mean(o.fetched),
            1,
        ),
    ]
    cost = [
        Column(
            ("duplicate", "replicas"),
            "replicas a layer that share a GPU with another replica of their expert, which gains nothing",
            lambda o: mean(o.duplicates),
            1,
        ),
        Column(
            ("ms", "per plan"),
            f"time to plan all layers of a window on this machine, backend {backend}",
            lambda o: median(o.milliseconds),
            1,
            min,
        ),
    ]
    return [*planned, *(change if windows.count > 1 else []), *cost]


def print_comparison(
    out: Console, columns: Sequence[Column], unplanned: Outcome, outcomes: Sequence[Outcome], num_windows: int
) -> None:
    """A row a policy below the row of experts spread in order; then what each column means."""
    rows = {outcome.policy: [column.cell(outcome) for column in columns] for outcome in (unplanned, *outcomes)}
    padding = 1 if out.width >= ROOMY else 0
    widths = [
        max(map(len, (*column.heading, *cells)))
        for column, cells in zip(columns, zip(*rows.values(), strict=True), strict=True)
    ]
    left = out.width - sum(widths) - (1 + 2 * padding) * len(columns) - 2  # for the names, edges and dividers off
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, padding))
    table.add_column("policy", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column("\n".join(column.heading), justify="right", no_wrap=True)
    best = [column.best_cell(outcomes) for column in columns]
    for policy, cells in rows.items():
        if policy == unplanned.policy:
            table.add_row(broken(policy, left), *cells, style=UNPLANNED_STYLE)
        else:
            styles = [BEST_STYLE if cell == marked else "" for cell, marked in zip(cells, best, strict=True)]
            table.add_row(broken(policy, left), *map(Text, cells, styles))
    out.print(table)
    legend = Table.grid(padding=(0, 2))
    for column in columns:
        legend.add_row(" ".join(column.heading), column.explanation)
    out.print(legend)
    if num_windows == 1:
        say(out, "Only one window: no next one to judge a plan by, and no plan to move from. --window cuts a series.")
    else:
        say(out, f"Means over {num_windows} windows; median of the times.")
        replanning = [name for name, policy in POLICIES.items() if policy.replan]
        say(out, f"{', '.join(replanning)}: from its own plan before, by all steps so far; the others plan anew.")


def print_definitions(out: Console, topology: Topology, pairing: bool) -> None:
    """What the figures above are."""
    for line in (BALANCEDNESS, GAP, words.bound_words(topology, pairing)):
        if line:
            out.print(line)  # broken between words: there is no path in it to be copied


def print_gaps_of_layers(out: Console, outcomes: Sequence[Outcome]) -> None:
    """A row a layer, a column a policy: the gap to the lower bound, mean over the windows planned."""
    title = "gap % of every layer, mean over windows; the smallest stand out"
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left", title_style="bold")
    table.add_column("layer", justify="right", vertical="bottom")
    for outcome in outcomes:
        table.add_column(broken(outcome.policy, 0), justify="right", vertical="bottom", overflow="fold")
    layers = zip(*(torch.stack(outcome.gaps).mean(0).tolist() for outcome in outcomes), strict=True)
    for layer, row in enumerate(layers):
        cells, best = [percent(gap) for gap in row], percent(min(row))
        table.add_row(str(layer), *(Text(cell, BEST_STYLE if cell == best else "") for cell in cells))
    out.print(table)


def print_gain(
    out: Console, weight: Tensor, bound: Tensor, before: Placement, after: Placement, named: str = IN_ORDER
) -> None:
    """What a plan gains over `before`, which is called `named`, and how near it is to the lower bound."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (named, broken(printable(after.policy), NAME_WIDTH)):
        table.add_column(heading, justify="right", no_wrap=True)
    old, new = f"{before.balancedness(weight):.4f}", f"{after.balancedness(weight):.4f}"
    table.add_row("balancedness", old, Text(new, BEST_STYLE))
    gaps = [gaps_of(placement, weight, bound) for placement in (before, after)]
    table.add_row("mean gap %", *(percent(gap.mean()) for gap in gaps))
    table.add_row("worst gap %", *(percent(gap.max()) for gap in gaps))
    table.add_row("duplicate replicas", *(f"{int(p.duplicates().sum()):,}" for p in (before, after)))
    out.print(table)


def print_worst_layers(
    out: Console, weight: Tensor, bound: Tensor, placement: Placement, before: Placement, named: str = IN_ORDER
) -> None:
    """The layers of lowest balancedness under `placement`, worst first (ties: lowest layer)."""
    balancedness, unplanned = (p.balancedness(weight, per_layer=True) for p in (placement, before))
    loads, gaps = placement.gpu_loads(weight), gaps_of(placement, weight, bound)
    worst = torch.argsort(balancedness, stable=True)[:WORST_LAYERS].tolist()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="worst layers", title_justify="left", title_style="bold")
    # Two lines, to fit into 80 columns; the mean load is balancedness times the busiest GPU's.
    named = broken(named, 8)
    for heading in ("layer", "balancedness", named, "gap %", "busiest\nGPU", "its\nload", "lower\nbound"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for layer in worst:
        busiest = int(loads[layer].argmax())
        table.add_row(
            str(layer),
            f"{float(balancedness[layer]):.4f}",
            f"{float(unplanned[layer]):.4f}",
            percent(gaps[layer]),
            str(busiest),
            f"{float(loads[layer, busiest]):,.1f}",
            f"{float(bound[layer]):,.1f}",
        )
    out.print(table)


def print_layers(out: Console, weight: Tensor, bound: Tensor, placement: Placement) -> None:
    """Balancedness and gap of every layer, in as many columns as there is room for, read downwards."""
    balancedness, gaps = placement.balancedness(weight, per_layer=True), gaps_of(placement, weight, bound)
    num_layers = len(gaps)
    columns = max(1, min(out.width // LAYER_WIDTH, ceil(num_layers / LAYERS_BELOW_EACH_OTHER)))
    height = ceil(num_layers / columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="every layer", title_justify="left", title_style="bold")
    for heading in ("layer", "balancedness", "gap %") * ceil(num_layers / height):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in range(height):
        cells: list[str] = []
        for layer in range(row, num_layers, height):
            cells += [str(layer), f"{float(balancedness[layer]):.4f}", percent(gaps[layer])]
        table.add_row(*cells)
    out.print(table)


def print_sparklines(out: Console, weight: Tensor, before: Placement, after: Placement) -> None:
    """The GPUs of the layer that was worst before, a mark each."""
    layer = int(before.balancedness(weight, per_layer=True).argmin())
    full = float(before.gpu_loads(weight)[layer].max())
    say(out, f"Layer {layer}, the worst of the last step, a bar a GPU:")
    for placement in (before, after):
        loads = placement.gpu_loads(weight)[layer]
        over = float(loads.max() / loads.mean())
        marks = sparkline(out, loads.tolist(), full)
        out.print(Text.assemble(f"  {placement.policy:10} ", (marks, "cyan"), f"  busiest GPU {over:.2f} x the mean"))


def print_windows(out: Console, windows: Windows, placement: Placement, before: Placement) -> None:
    """Balancedness of one plan on window after window."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (f"first {windows.recording.unit}", "balancedness", "experts in order", "worst layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index in range(windows.count):
        weight = windows.loads(index)
        layers = placement.balancedness(weight, per_layer=True)
        worst = int(layers.argmin())
        table.add_row(
            f"{index * windows.size:,}",
            f"{placement.balancedness(weight):.4f}",
            f"{before.balancedness(weight):.4f}",
            f"{worst} ({float(layers[worst]):.4f})",
        )
    out.print(table)
