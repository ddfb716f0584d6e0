"""What replanning changes, and what that gains."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eplb_triton import Placement
from eplb_triton.cli import words
from eplb_triton.cli.study import Outcome, mean
from eplb_triton.cli.terminal import say
from eplb_triton.replay import Summary, judged

FIRST_LAYERS = 10
ALIKE = 0.0005  # of a busiest GPU over the mean: what is printed alike is called alike


def print_change(out: Console, steps: Tensor, live: Placement, ahead: Placement) -> None:
    """What has to be written to come from `live` to `ahead`, and what is expected of that."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("a layer", "mean", "most", "all layers"):
        table.add_column(heading, justify="left" if heading == "a layer" else "right", no_wrap=True)
    moved = ahead.moved(live)
    rows = {"slots written": moved.slots, "experts fetched": moved.fetches}
    if ahead.changes is not None:
        rows = {"slots written": ahead.changes.written, "fills": ahead.changes.fills, "experts fetched": moved.fetches}
    for name, values in rows.items():
        table.add_row(name, f"{float(values.double().mean()):,.1f}", f"{int(values.max()):,}", f"{int(values.sum()):,}")
    out.print(table)
    old, new = (Summary.of(judged(steps, placement)).balancedness for placement in (live, ahead))
    say(out, f"balancedness step by step, over this history: {old:.4f} in force, {new:.4f} planned")
    if ahead.changes is None:
        return
    before, after = ahead.changes.peak_before, ahead.changes.peak_after
    say(
        out,
        f"predicted busiest GPU x the mean: {float(before.mean()):.4f} in force, {float(after.mean()):.4f} planned, "
        f"mean over layers; {float(before.max()):.4f} and {float(after.max()):.4f} in the worst",
    )
    order = [layer for layer in ahead.deployment_order().tolist() if layer >= 0]
    if order:
        more = f", and {len(order) - FIRST_LAYERS} more" if len(order) > FIRST_LAYERS else ""
        first = ", ".join(map(str, order[:FIRST_LAYERS]))
        say(out, f"deploy {words.counted(len(order), 'layer')}, largest gain first: {first}{more}")
    else:
        say(out, "no layer is worth a change")


def print_replanning(out: Console, anew: Outcome, replanned: Outcome, num_slots: int) -> None:
    """The last table of a comparison: a policy that plans anew beside one that replans; then a sentence about it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="What replanning gains", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for heading in ("next window,\nstep by step", "busiest GPU\nx the mean", "slots written\na layer and plan"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in (anew, replanned):
        following, written = mean(outcome.following) or 1.0, mean(outcome.moved) or 0.0
        table.add_row(outcome.policy, f"{following:.4f}", f"{1 / following:.3f}", f"{written:.1f} of {num_slots}")
    out.print(table)
    say(out, gain_words(anew, replanned))


def gain_words(anew: Outcome, replanned: Outcome) -> str:
    """One sentence about what replanning gains, whichever way the figures point."""
    peaks = [1 / (mean(outcome.following) or 1.0) for outcome in (anew, replanned)]
    written = [mean(outcome.moved) or 0.0 for outcome in (anew, replanned)]
    fall = peaks[0] - peaks[1]
    if abs(fall) < ALIKE:
        level = "as much as"
    else:
        level = f"{100 * abs(fall) / peaks[0]:.1f} % {'less' if fall > 0 else 'more'} than"
    return (
        f"In the steps after a plan, the busiest GPU carries {level} with {anew.policy} where {replanned.policy} "
        f"replans, and a plan writes {written[1]:.1f} slots a layer in place of {written[0]:.1f}."
    )
