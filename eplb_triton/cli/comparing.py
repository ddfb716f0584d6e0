"""The commands that set the policies side by side: compare, demo."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from eplb_triton import POLICIES, Topology
from eplb_triton.backends import resolve_backend
from eplb_triton.cli import changes, report, words
from eplb_triton.cli.gaps import lower_bounds
from eplb_triton.cli.inputs import check_backend, check_output, check_pairing, check_plot, read_for
from eplb_triton.cli.options import LoadsFile
from eplb_triton.cli.refusals import refusing
from eplb_triton.cli.study import Outcome, Windows, compare_policies
from eplb_triton.cli.terminal import console, progress, say
from eplb_triton.formats import LoadSeries, write_whole
from eplb_triton.policy import DEFAULT_POLICY, DEFAULT_REPLAN_POLICY
from eplb_triton.printing import shown
from eplb_triton.synthetic import lognormal_series

DEMO_WINDOWS = 5
DEMO_WINDOW = 16  # steps
DEMO_TOKENS = 8192  # of a step
DEMO_DRIFT = 0.002  # a step; 0.03 a window
DEMO_BURST = 0.35
TEXT_WIDTH = 100
DEMO_TOPOLOGY = Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4)


def compare(
    loads: LoadsFile,
    topology: Topology,
    backend: str,
    window: int | None,
    plot: Path | None,
    per_layer: bool,
    pairing: bool,
) -> None:
    """Plan every window of recorded LOADS with every policy, side by side."""
    check_plot(plot, loads.path)
    check_backend(backend)
    check_pairing(pairing, topology)
    recording = read_for(loads, topology)
    windows = Windows.cut(recording, window or recording.default_window)
    out = console()
    words.introduce(out, recording, topology)
    say(out, words.window_words(windows))
    _, outcomes = _compare(out, windows, topology, backend, plot, pairing)
    if per_layer:
        report.print_gaps_of_layers(out, outcomes)


def demo(seed: int, backend: str, plot: Path | None, output: Path | None) -> None:
    """Plan made-up loads of a DeepSeek-V3-sized model with every policy; needs no file."""
    check_output(output, (".npz",))
    check_plot(plot)
    check_backend(backend)
    steps = demo_loads(seed).numpy()
    if output is not None:
        file = io.BytesIO()
        np.savez_compressed(file, loads=steps)
        with refusing():
            write_whole(output, file.getvalue())
    recording = LoadSeries(Path("demo"), steps.shape[1], steps.shape[2], steps=steps)
    windows = Windows.cut(recording, DEMO_WINDOW)
    out = console()
    for paragraph in (
        "A mixture-of-experts layer is as slow as its busiest GPU. A plan gives experts that get many tokens more "
        "replicas, and puts the replicas on GPUs so that each GPU has about the same load.",
        f"Loads: {words.loads_words(recording)}, shaped like DeepSeek-V3's, made up from seed {seed}.",
        f"Plan: {words.topology_words(DEMO_TOPOLOGY, recording.num_experts)}.",
        f"Each policy below, a way to plan, plans every window of {DEMO_WINDOW} steps; its plan is judged on that "
        "window, and step by step on the one after it (the next window), where it serves. The first row is no planning "
        f"at all; {DEFAULT_POLICY} plans where nothing is in force, {DEFAULT_REPLAN_POLICY} from what is in force, by "
        "all steps so far.",
    ):
        out.print(paragraph, width=min(out.width, TEXT_WIDTH))
        say(out)
    unplanned, outcomes = _compare(out, windows, DEMO_TOPOLOGY, backend, plot)
    chosen, replanned = (
        next(outcome for outcome in outcomes if outcome.policy == name)
        for name in (DEFAULT_POLICY, DEFAULT_REPLAN_POLICY)
    )
    say(out)
    if unplanned.placement is not None and chosen.placement is not None:
        report.print_sparklines(out, windows.loads(windows.count - 1), unplanned.placement, chosen.placement)
    say(out)
    changes.print_replanning(out, chosen, replanned, DEMO_TOPOLOGY.num_replicas)
    say(out)
    _hint(out, output)


def demo_loads(seed: int) -> torch.Tensor:
    """[T, L, E], the made-up loads of the demo."""
    return lognormal_series(
        DEMO_WINDOWS * DEMO_WINDOW, tokens_per_step=DEMO_TOKENS, drift=DEMO_DRIFT, burst=DEMO_BURST, seed=seed
    )


def _hint(out: Console, written: Path | None) -> None:
    """The command to try next, on the loads of the demo if they were written."""
    topology = DEMO_TOPOLOGY
    loads = str(written or "demo.npz")
    options = (
        f"--replicas {topology.num_replicas} --gpus {topology.num_gpus} "
        f"--nodes {topology.num_nodes} --groups {topology.num_groups}"
    )
    say(out, "Try next, with these loads or a file of your own:", "bold")
    if written is None:
        say(out, f"  {_called()} demo -o {loads}")
    say(out, f"  {_called()} plan {shlex.quote(loads)} {options} -o plan.npz")
    say(out, f"  {_called()} plan {shlex.quote(loads)} --previous plan.npz --moves 8")


def _called() -> str:
    """What to type to call this program again."""
    script = Path(sys.argv[0])
    if script.name != "eplb-triton":
        return "python -m eplb_triton"
    found = shutil.which(script.name)
    return script.name if found and Path(found).resolve() == script.resolve() else os.path.relpath(script)


def _compare(
    out: Console, windows: Windows, topology: Topology, backend: str, plot: Path | None, pairing: bool = False
) -> tuple[Outcome, list[Outcome]]:
    """Plan, print and draw; returns the outcome of no planning and those of the policies."""
    recording = windows.recording
    all_loads = (windows.loads(index) for index in range(windows.count))
    with refusing(recording.path):
        bounds = lower_bounds(all_loads, windows.count * recording.num_layers, topology, pairing)
    with progress("planning", windows.count * len(POLICIES)) as advance, refusing(recording.path):
        unplanned, outcomes = compare_policies(windows, bounds, topology, backend, advance)
    columns = report.comparison_columns(windows, topology, resolve_backend(backend, torch.device("cpu")))
    report.print_comparison(out, columns, unplanned, outcomes, windows.count)
    report.print_definitions(out, topology, pairing)
    if plot is not None:
        from eplb_triton.cli import plots  # noqa: PLC0415 - matplotlib is only imported to draw

        span = words.span_words(recording, (windows.count - 1) * windows.size, windows.count * windows.size)
        title = f"{shown(Path(recording.path.name))}, {span}\n{words.topology_words(topology, recording.num_experts)}"
        with refusing():
            plots.draw(plot, title, windows.loads(windows.count - 1), [unplanned, *outcomes])
        say(out, f"wrote {shown(plot)}", "bold")
    return unplanned, outcomes
