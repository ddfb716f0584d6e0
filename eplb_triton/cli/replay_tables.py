"""The tables of a replay."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from eplb_triton.cli.replay_study import FORESIGHT, UNPLANNED, Outcome, plans_on
from eplb_triton.cli.terminal import say
from eplb_triton.replay import EVEN

LABELS = {
    UNPLANNED: "none: experts in order",
    FORESIGHT: "knows what comes, moves free",
}
NOTHING = "-"


def label(outcome: Outcome) -> str:
    """What a deployment is called in tables and pictures."""
    return LABELS.get(outcome.name, outcome.name)


def print_deployments(out: Console, outcomes: Sequence[Outcome]) -> None:
    """A line for each deployment and split."""
    base = next(outcome for outcome in outcomes if outcome.name == UNPLANNED)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("planner", "tokens split"):
        table.add_column(heading, no_wrap=True, vertical="bottom")
    headings = ("PAR\nmean", "\np99", "\nsaved", "\nseconds", "slots a\nlayer, plan", "GB\nmoved", "pays back\nafter")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for outcome in outcomes:
        for split, tally in outcome.tallies.items():
            saved = NOTHING if outcome is base and split == EVEN else percent(outcome.saved(base, split))
            cells = [f"{tally.mean:.3f}", f"{tally.percentile(0.99):.3f}", saved, amount(outcome.seconds(split))]
            moves = [NOTHING] * 3 if split == EVEN else [""] * 3
            if outcome.written and split == EVEN:
                back = NOTHING if outcome.name == FORESIGHT else steps(outcome.paid_back(base))
                moves = [f"{outcome.slots_a_plan:.1f}", gigabytes(outcome), back]
            table.add_row(label(outcome) if split == EVEN else "", split, *cells, *moves)
    out.print(table)
    for line in (
        "PAR = load of the busiest GPU / mean GPU load of a step and layer; p99: 99 of 100 have no more",
        "seconds = layer time x PAR summed over steps and layers + slots written x slot / bandwidth",
        "saved: of the seconds without a plan; pays back after: the steps until the moves of one plan have paid",
    ):
        out.print(line)
    times = ", ".join(f"{label(o)} {o.plan_ms:,.1f} ms" for o in outcomes if plans_on(o.name))
    say(out, f"a plan took on this machine, in one thread: {times}")


def print_sweep(out: Console, sweep: Sequence[Outcome], chosen: Outcome) -> None:
    """A line for each setting that was tried, the chosen one marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="What was tried", title_justify="left")
    headings = ("replicas", "every", "policy", "PAR\nmean", "\np99", "\nseconds", "slots a\nlayer, plan")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True, vertical="bottom")
    for outcome in sweep:
        (tally,) = outcome.tallies.values()
        table.add_row(
            f"{outcome.setting.topology.num_replicas}",
            f"{outcome.setting.interval:,}",
            outcome.name,
            f"{tally.mean:.3f}",
            f"{tally.percentile(0.99):.3f}",
            amount(outcome.seconds()),
            f"{outcome.slots_a_plan:.1f}",
            style="bold green" if outcome is chosen else None,
        )
    out.print(table)


def percent(share: float) -> str:
    """`21.3 %`; no minus before a zero."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def amount(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def gigabytes(outcome: Outcome) -> str:
    """All slots written, in GB."""
    return amount(outcome.written * outcome.setting.costs.slot_bytes / 1e9)


def steps(count: float) -> str:
    """`120 steps`, `never`."""
    return f"{math.ceil(count):,} steps" if math.isfinite(count) else "never"
