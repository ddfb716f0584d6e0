"""The commands about one plan: plan, score, check."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from torch import Tensor

from eplb_triton import Placement, Topology, plan
from eplb_triton.cli import report, words
from eplb_triton.cli.gaps import lower_bounds
from eplb_triton.cli.options import (
    LoadsFile,
    Refused,
    backend_option,
    check_output,
    check_pairing,
    experts_option,
    loads_argument,
    pairing_option,
    policy_option,
    refusing,
    topology_options,
    window_option,
)
from eplb_triton.cli.study import Windows
from eplb_triton.cli.terminal import console, say
from eplb_triton.formats import read_plan, shown, write_plan
from eplb_triton.formats.plans import PLAN_SUFFIXES


class InvalidPlan(click.ClickException):
    """A plan file that reads, but holds no valid plan."""

    exit_code = 1


plan_argument = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))


@click.command("plan", short_help="Plan a placement for recorded loads.")
@topology_options
@policy_option
@window_option("Plan for the most recent W steps (tokens of a trace). Default: all of them, summed.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Write the plan to FILE, which ends in {', '.join(PLAN_SUFFIXES)}.",
)
@click.option(
    "--log2phy/--no-log2phy",
    default=True,
    show_default=True,
    help="Also write log2phy, which has E (P - E + 1) entries a layer.",
)
@pairing_option
@loads_argument
@experts_option
@backend_option
def plan_command(
    loads: LoadsFile,
    topology: Topology,
    policy: str,
    backend: str,
    window: int | None,
    output: Path | None,
    log2phy: bool,
    pairing: bool,
) -> None:
    """Plan a placement for recorded LOADS and say what it gains, and how near it is to the best possible."""
    check_output(output, PLAN_SUFFIXES, loads.path)
    check_pairing(pairing, topology)
    recording = loads.read_for(topology)
    first = max(0, recording.length - (window or recording.length))
    weight = recording.loads(first, recording.length)
    with refusing(loads.path):
        placement = plan(weight, topology, policy=policy, backend=backend)
    if output is not None:  # before anything is printed: `| head` may end this process at any line
        with refusing():
            write_plan(output, placement, log2phy=log2phy)
    (bound,) = lower_bounds([weight], recording.num_layers, topology, pairing)
    before = Placement.spread_in_order(recording.num_layers, recording.num_experts, topology)
    out = console()
    words.introduce(out, recording, topology)
    say(out, words.planned_words(recording, first, window))
    _print_judgement(out, weight, bound, before, placement, pairing)
    say(out, f"fingerprint {placement.fingerprint()}")
    if output is not None:
        say(out, f"wrote {shown(output)}{'' if log2phy else ' (without log2phy)'}", "bold")


def _print_judgement(
    out: Console, weight: Tensor, bound: Tensor, before: Placement, after: Placement, pairing: bool
) -> None:
    """The plan `after` beside experts in order: overall, the worst layers, every layer."""
    report.print_gain(out, weight, bound, before, after)
    report.print_definitions(out, after.topology, pairing)
    report.print_worst_layers(out, weight, bound, after, before)
    report.print_layers(out, weight, bound, after)


@click.command("score", short_help="Judge a plan by recorded loads.")
@plan_argument
@loads_argument
@window_option("Also score every window of W steps (tokens of a trace).")
@pairing_option
def score_command(plan_path: Path, loads: LoadsFile, window: int | None, pairing: bool) -> None:
    """Judge the plan in the file PLAN by recorded LOADS."""
    with refusing():
        placement = read_plan(plan_path).placement()
    check_pairing(pairing, placement.topology)
    # A trace need not name every expert of the plan, so the plan says how many there are.
    recording = LoadsFile(loads.path, loads.key, loads.kind, placement.num_experts).read()
    if recording.num_layers != placement.num_layers:
        raise Refused(
            f"{shown(loads.path)}: expected {placement.num_layers} layers like {shown(plan_path)}; "
            f"found {recording.num_layers}"
        )
    weight = recording.loads(0, recording.length)
    (bound,) = lower_bounds([weight], recording.num_layers, placement.topology, pairing)
    before = Placement.spread_in_order(recording.num_layers, recording.num_experts, placement.topology)
    out = console()
    words.introduce(out, recording, placement.topology)
    say(out, f"{shown(plan_path)}: policy {placement.policy}, fingerprint {placement.fingerprint()}")
    _print_judgement(out, weight, bound, before, placement, pairing)
    if window is not None:
        windows = Windows.cut(recording, window)
        say(out, words.window_words(windows))
        report.print_windows(out, windows, placement, before)


@click.command("check", short_help="Check a plan file.")
@plan_argument
def check_command(plan_path: Path) -> None:
    """Check the plan in the file PLAN; exit status 1 and the first fault if it is invalid."""
    with refusing():
        stored = read_plan(plan_path)
    try:
        placement = stored.placement()
    except ValueError as error:
        raise InvalidPlan(str(error)) from error
    out = console()
    say(out, f"{shown(plan_path)}: a valid plan, {words.counted(placement.num_layers, 'layer')}", "bold")
    say(out, words.topology_words(placement.topology, placement.num_experts))
    log2phy = "agrees with phy2log" if stored.log2phy is not None else "left out"
    say(out, f"policy {placement.policy}, fingerprint {placement.fingerprint()}, log2phy {log2phy}")
