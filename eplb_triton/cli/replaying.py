"""The command `replay`: what imbalance costs on recorded traffic, and what plans would have saved."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import click

from eplb_triton import Topology
from eplb_triton.cli import words
from eplb_triton.cli.assumptions import Assumption, costs_of, of_setting
from eplb_triton.cli.inputs import check_backend, check_report
from eplb_triton.cli.options import EXAMPLE, Counts, LoadsFile
from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.cli.replay_study import FORESIGHT, KEPT, UNPLANNED, Outcome, Setting, replay_all
from eplb_triton.cli.replay_tables import print_deployments, print_sweep
from eplb_triton.cli.terminal import console, progress, say
from eplb_triton.cli.verdict import NOTHING, as_json, in_words
from eplb_triton.formats import StepStream, open_steps
from eplb_triton.printing import printable, shown
from eplb_triton.replay import EVEN, SPLITS

POLICIES = ("deepseek", "balanced", "steady")
KEPT_POLICIES = ("balanced", "steady")
"""Those whose first plan is also served without a second."""
INTERVAL = 256
FEWEST_PLANS = 8


@dataclass(frozen=True)
class Findings:
    """All that a replay found: what the tables, the JSON and the page are made from."""

    stream: StepStream
    verdict: list[str]
    outcomes: list[Outcome]  # of one setting
    sweep: list[Outcome]  # of every setting that was tried; empty if there was only one
    chosen: Outcome | None  # of the sweep
    assumptions: list[Assumption]
    command: str  # that finds the same again, whatever is the default then


def replay(
    traces: Sequence[LoadsFile],
    gpus: int,
    nodes: int | None,
    groups: int | None,
    replicas: Sequence[int],
    intervals: Sequence[int],
    policies: Sequence[str],
    window: int | None,
    step_tokens: int,
    slot_bytes: float | None,
    bandwidth: float | None,
    layer_time: float | None,
    at_once: bool,
    from_start: bool,
    backend: str,
    json_wanted: bool,
    report: Path | None,
) -> None:
    """Replay recorded traffic under every planner, and say what each would have saved."""
    check_report(report)
    check_backend(backend)
    stream = open_stream(traces, step_tokens)
    pairs = list(product(topologies(stream, gpus, nodes, groups, replicas), checked_intervals(stream, intervals)))
    costs, assumptions = costs_of(stream, gpus, slot_bytes, bandwidth, layer_time)
    layer_steps = 0.0 if at_once else 1.0
    skipped = 0 if from_start else settled(stream, [interval for _, interval in pairs], layer_steps)
    settings = [
        Setting(topology, interval, costs, window, layer_steps, backend, judged_from=skipped)
        for topology, interval in pairs
    ]
    chosen = list(dict.fromkeys(policies or POLICIES))
    found = find(stream, settings, chosen, assumptions, _command(traces, settings, chosen, step_tokens))
    if report is not None:
        from eplb_triton.cli.page import write_page  # noqa: PLC0415 - matplotlib takes a second to import

        write_page(report, found)
    if json_wanted:
        body = {
            **as_json(stream, found.verdict, found.outcomes, found.sweep, found.assumptions),
            "command": found.command,
        }
        click.echo(json.dumps(body, indent=1, allow_nan=False))
        return
    print_findings(found)
    if report is not None:
        say(console(), f"wrote {shown(report)}", "bold")


def open_stream(traces: Sequence[LoadsFile], step_tokens: int) -> StepStream:
    """The steps of all recordings, or a refusal. `example` is the recording that ships with this package, where no file
    is called so."""
    first = traces[0]
    paths = [trace.path for trace in traces]
    shipped = [EXAMPLE if path == Path("example") and not path.exists() else path for path in paths]
    with refusing():
        stream = open_steps(
            shipped, key=first.key, kind=first.kind, num_experts=first.num_experts, step_tokens=step_tokens
        )
    stream = replace(stream, paths=tuple(paths))
    if stream.length < 3:
        raise Refused(
            f"{shown(first.path)}: expected at least 3 steps, of which some come after a plan; found {stream.length}; "
            "--step-tokens says how many tokens of a trace are a step"
        )
    return stream


def topologies(
    stream: StepStream, gpus: int, nodes: int | None, groups: int | None, replicas: Sequence[int]
) -> list[Topology]:
    """The topologies asked for, by their replicas; by default a redundant slot on every GPU."""
    counts = list(dict.fromkeys(replicas)) or [(-(-stream.num_experts // max(1, gpus)) + 1) * max(1, gpus)]
    made = [Counts(count, gpus, nodes, groups).topology() for count in sorted(counts)]
    for topology in made:
        with refusing(stream.paths[0]):
            topology.check_experts(stream.num_experts)
    return made


def checked_intervals(stream: StepStream, intervals: Sequence[int]) -> list[int]:
    """The intervals asked for, the longest first; by default `INTERVAL`, or an eighth of a short recording."""
    chosen = sorted(set(intervals), reverse=True) or [max(1, min(INTERVAL, stream.length // FEWEST_PLANS))]
    if chosen[0] + 2 > stream.length:
        raise Refused(
            f"--interval {chosen[0]} must be at most {stream.length - 2}: there are {stream.length} steps, and a plan "
            "is judged by those that follow"
        )
    return chosen


def settled(stream: StepStream, intervals: Sequence[int], layer_steps: float) -> int:
    """Steps until the first plan is in force in every deployment, the same for all: how experts stand before says
    nothing about plans. No more than half of the steps."""
    first = max(intervals) + (1 + math.ceil(stream.num_layers * layer_steps) if layer_steps else 0)
    return min(first, stream.length // 2)


def _command(
    traces: Sequence[LoadsFile], settings: Sequence[Setting], policies: Sequence[str], step_tokens: int
) -> str:
    """What to type for the same figures, with all that was left to defaults."""
    first, setting = traces[0], settings[0]
    topology, costs = setting.topology, setting.costs
    options: list[tuple[str, object]] = [
        ("key", first.key),
        ("kind", first.kind),
        ("experts", first.num_experts),
        ("step-tokens", step_tokens),
        ("gpus", topology.num_gpus),
        ("nodes", topology.num_nodes),
        ("groups", topology.num_groups),
        *(("replicas", count) for count in dict.fromkeys(each.topology.num_replicas for each in settings)),
        *(("interval", steps) for steps in dict.fromkeys(each.interval for each in settings)),
        *(("policy", policy) for policy in policies),
        ("window", setting.window),
        ("slot-bytes", _exact(costs.slot_bytes)),
        ("bandwidth", _exact(costs.bandwidth)),
        ("layer-time", _exact(costs.layer_seconds)),
    ]
    given = [word for name, value in options if value is not None for word in (f"--{name}", str(value))]
    flags = [] if setting.layer_steps else ["--at-once"]
    flags += [] if setting.judged_from else ["--from-start"]
    return shlex.join(["eplb-triton", "replay", *(str(trace.path) for trace in traces), *given, *flags])


def _exact(value: float) -> str:
    """A number that reads as the same bits."""
    return repr(float(value)).removesuffix(".0")


def find(
    stream: StepStream,
    settings: Sequence[Setting],
    policies: Sequence[str],
    assumptions: Sequence[Assumption],
    command: str,
) -> Findings:
    """Try every setting; then serve the steps by every deployment and split under the best one."""
    sweep: list[Outcome] = []
    chosen = None
    setting = settings[0]
    if len(settings) > 1:
        pairs = [(setting, policy) for setting in settings for policy in policies]
        with progress("trying settings", stream.length) as advance, refusing():
            sweep = replay_all(stream, pairs, (EVEN,), advance)
        chosen = choose(sweep)
        setting = chosen.setting
    kept = [policy for policy in KEPT_POLICIES if policy in policies] or policies[:1]
    names = [UNPLANNED, *(policy + KEPT for policy in kept), *policies, FORESIGHT]
    with progress("replaying", stream.length) as advance, refusing():
        outcomes = replay_all(stream, [(setting, name) for name in names], SPLITS, advance)
    return Findings(
        stream, in_words(stream, outcomes), outcomes, sweep, chosen, [*assumptions, *of_setting(setting)], command
    )


def choose(sweep: Sequence[Outcome]) -> Outcome:
    """The outcome of least modelled time; of those that differ from it by nothing, fewer replicas, then longer
    intervals, then fewer slots."""
    least = min(outcome.seconds() for outcome in sweep)
    alike = [outcome for outcome in sweep if outcome.seconds() <= least * (1 + NOTHING)]
    return min(alike, key=lambda o: (o.setting.topology.num_replicas, -o.setting.interval, o.written))


def print_findings(found: Findings) -> None:
    """The verdict, the tables, and what was assumed."""
    out, stream, setting = console(), found.stream, found.outcomes[0].setting
    say(out, " ".join(found.verdict), "bold")
    say(out)
    say(out, words.stream_words(stream))
    for note in stream.notes:
        say(out, printable(f"note: {note}"), "yellow")
    say(out, words.topology_words(setting.topology, stream.num_experts))
    print_deployments(out, found.outcomes)
    if found.chosen is not None:
        print_sweep(out, found.sweep, found.chosen)
    say(out)
    for assumption in found.assumptions:
        say(out, assumption.text)
