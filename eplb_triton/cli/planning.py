"""The commands about one plan: plan, score, check."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from torch import Tensor

from eplb_triton import Placement, plan
from eplb_triton.cli import changes, report, words
from eplb_triton.cli.gaps import lower_bounds
from eplb_triton.cli.inputs import check_backend, check_output, check_pairing, read, read_for
from eplb_triton.cli.options import Counts, LoadsFile
from eplb_triton.cli.refusals import InvalidPlan, Refused, refusing
from eplb_triton.cli.study import Windows
from eplb_triton.cli.terminal import console, say
from eplb_triton.formats import read_plan, write_plan
from eplb_triton.formats.plans import PLAN_SUFFIXES
from eplb_triton.policy import DEFAULT_POLICY, DEFAULT_REPLAN_POLICY, resolve_policy
from eplb_triton.printing import printable, shown


def plan_loads(
    loads: LoadsFile,
    counts: Counts,
    policy: str | None,
    previous: Path | None,
    price: float | None,
    moves: int | None,
    backend: str,
    window: int | None,
    output: Path | None,
    log2phy: bool,
    pairing: bool,
) -> None:
    """Plan a placement for recorded LOADS and say what it gains, and how near it is to the best possible."""
    replans = _check_price(policy, previous, price, moves)
    live = None if previous is None else _placement(previous)
    topology = counts.topology() if live is None else counts.of(live.topology, previous or Path())
    check_output(output, PLAN_SUFFIXES, loads.path)
    check_backend(backend)
    check_pairing(pairing, topology)
    recording = read_for(loads, topology)
    if live is not None and live.logcnt.shape != (recording.num_layers, recording.num_experts):
        raise Refused(
            f"{shown(loads.path)}: expected {words.counted(live.num_layers, 'layer')} of "
            f"{words.counted(live.num_experts, 'expert')} like {shown(previous or Path())}; "
            f"found {recording.num_layers} of {recording.num_experts}"
        )
    first = max(0, recording.length - (window or recording.length))
    weight = recording.loads(first, recording.length)
    steps = recording.steps_of(first, recording.length)
    with refusing(loads.path):
        placement = plan(
            steps if replans else weight,
            topology,
            policy=policy,
            previous=live,
            price=price,
            moves=moves,
            backend=backend,
        )
    if output is not None:  # before anything is printed: `| head` may end this process at any line
        with refusing():
            write_plan(output, placement, log2phy=log2phy)
    (bound,) = lower_bounds([weight], recording.num_layers, topology, pairing)
    before = live or Placement.spread_in_order(recording.num_layers, recording.num_experts, topology)
    out = console()
    words.introduce(out, recording, topology)
    say(out, words.planned_words(recording, first, window, steps=len(steps) if replans else None))
    if live is None:
        _print_judgement(out, weight, bound, before, placement, pairing)
    else:
        changes.print_change(out, steps, live, placement)
        _print_judgement(out, weight, bound, live, placement, pairing, named="in force")
    say(out, f"fingerprint {placement.fingerprint()}")
    if output is not None:
        say(out, f"wrote {shown(output)}{'' if log2phy else ' (without log2phy)'}", "bold")


def _check_price(policy: str | None, previous: Path | None, price: float | None, moves: int | None) -> bool:
    """Whether the policy replans; a refusal where what only such a policy takes was given to another."""
    name = policy or (DEFAULT_POLICY if previous is None else DEFAULT_REPLAN_POLICY)
    replans = resolve_policy(name).replan is not None
    for option, value in (("price", price), ("moves", moves)):
        if value is None:
            continue
        if previous is None:
            raise Refused(f"--{option} {value} needs --previous PLAN, the plan that slots are written over")
        if not replans:
            raise Refused(f"--{option} {value} is for a policy that replans, {DEFAULT_REPLAN_POLICY!r}, not {name!r}")
    if price is not None and not 0 <= price < math.inf:
        raise Refused(f"--price {price} must be at least 0 and finite")
    return replans


def _placement(path: Path) -> Placement:
    """The valid plan in a file, or a refusal."""
    with refusing():
        return read_plan(path).placement()


def _print_judgement(
    out: Console,
    weight: Tensor,
    bound: Tensor,
    before: Placement,
    after: Placement,
    pairing: bool,
    named: str = report.IN_ORDER,
) -> None:
    """The plan `after` beside what was `before`, which is called `named`: overall, the worst layers, every layer."""
    report.print_gain(out, weight, bound, before, after, named)
    report.print_definitions(out, after.topology, pairing)
    report.print_worst_layers(out, weight, bound, after, before, named)
    report.print_layers(out, weight, bound, after)


def score(plan_path: Path, loads: LoadsFile, window: int | None, pairing: bool) -> None:
    """Judge the plan in the file PLAN by recorded LOADS."""
    placement = _placement(plan_path)
    check_pairing(pairing, placement.topology)
    # A trace need not name every expert of the plan, so the plan says how many there are.
    recording = read(loads, placement.num_experts)
    if recording.num_layers != placement.num_layers:
        raise Refused(
            f"{shown(loads.path)}: expected {placement.num_layers} layers like {shown(plan_path)}; "
            f"found {recording.num_layers}"
        )
    weight = recording.loads(0, recording.length)
    with refusing(loads.path):
        (bound,) = lower_bounds([weight], recording.num_layers, placement.topology, pairing)
    before = Placement.spread_in_order(recording.num_layers, recording.num_experts, placement.topology)
    out = console()
    words.introduce(out, recording, placement.topology)
    say(out, f"{shown(plan_path)}: policy {printable(placement.policy)}, fingerprint {placement.fingerprint()}")
    _print_judgement(out, weight, bound, before, placement, pairing)
    if window is not None:
        windows = Windows.cut(recording, window)
        say(out, words.window_words(windows))
        report.print_windows(out, windows, placement, before)


def check(plan_path: Path) -> None:
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
    say(out, f"policy {printable(placement.policy)}, fingerprint {placement.fingerprint()}, log2phy {log2phy}")
