"""Sentences that several commands say."""

from __future__ import annotations

from rich.console import Console

from eplb_triton import Topology
from eplb_triton.cli.study import Windows
from eplb_triton.cli.terminal import say
from eplb_triton.formats import Recording, RoutingTrace, StepStream
from eplb_triton.printing import printable, shown


def counted(number: int, noun: str) -> str:
    """`1 step`, `8,327 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def loads_words(recording: Recording) -> str:
    """`8,327 tokens, 26 layers, 6 of 64 experts a token`."""
    text = f"{counted(recording.length, recording.unit)}, {counted(recording.num_layers, 'layer')}, "
    if isinstance(recording, RoutingTrace):
        return text + f"{recording.topk_ids.shape[2]} of {recording.num_experts} experts a token"
    return text + counted(recording.num_experts, "expert")


def stream_words(stream: StepStream) -> str:
    """`law.npz, 65 steps, 26 layers, 64 experts`."""
    names = ", ".join(shown(path) for path in stream.paths)
    counts = counted(stream.length, "step"), counted(stream.num_layers, "layer"), counted(stream.num_experts, "expert")
    return f"{names}: {', '.join(counts)}"


def span_words(recording: Recording, start: int, stop: int) -> str:
    """`step 4`, `tokens 6,000 to 7,999`: the steps or tokens start..stop-1, counted from 0."""
    if stop - start == 1:
        return f"{recording.unit} {start:,}"
    return f"{recording.unit}s {start:,} to {stop - 1:,}"


def topology_words(topology: Topology, num_experts: int) -> str:
    """`80 replicas of 64 experts on 16 GPUs, 5 slots each; 1 node: global planning, ...`."""
    nodes, groups = topology.num_nodes, counted(topology.num_groups, "group")
    text = (
        f"{topology.num_replicas} replicas of {counted(num_experts, 'expert')} on "
        f"{counted(topology.num_gpus, 'GPU')}, {counted(topology.slots_per_gpu, 'slot')} each; {counted(nodes, 'node')}"
    )
    if nodes == 1:
        return f"{text}: global planning, any expert on any GPU"
    if topology.hierarchical:
        return f"{text}, {groups}: hierarchical planning, a group stays on one node"
    return f"{text}: global planning, since {groups} cannot be split evenly over {nodes} nodes"


def bound_words(topology: Topology, pairing: bool) -> str:
    """Which lower bound gaps are measured against, where there are two; else nothing."""
    if topology.slots_per_gpu != 2:
        return ""
    if pairing:
        return "lower bound: with the pairing of two slots a GPU"
    return (
        "lower bound: without the pairing of two slots a GPU, so that gaps look larger than they are; "
        "--pairing-bound includes it, at about 0.6 s a layer of 256 experts"
    )


def introduce(out: Console, recording: Recording, topology: Topology) -> None:
    """What is planned, for what, and what the reader of the file has to say."""
    say(out, f"{shown(recording.path)}: {loads_words(recording)}", "bold")
    for note in recording.notes:
        say(out, printable(f"note: {note}"), "yellow")
    say(out, topology_words(topology, recording.num_experts))


def window_words(windows: Windows) -> str:
    """How the recording was cut, and what was left out."""
    unit = windows.recording.unit
    text = f"{counted(windows.count, 'window')} of {counted(windows.size, unit)}"
    if windows.size < windows.asked:
        text += f", shorter than the {windows.asked:,} asked for: the recording has no more"
    if windows.left_out:
        verb = "is" if windows.left_out == 1 else "are"
        text += f"; the last {counted(windows.left_out, unit)} {verb} left out, too few for a window"
    return text


def planned_words(recording: Recording, first: int, window: int | None, steps: int | None) -> str:
    """Which part of the recording a single plan is for: their sum, or a history of `steps`."""
    if recording.length == 1:
        return f"planned for its one {recording.unit}"
    how = "summed" if steps is None else f"a history of {counted(steps, 'step')}"
    text = f"planned for {span_words(recording, first, recording.length)}, {how}"
    if window is not None and window > recording.length:
        text += f"; {window:,} were asked for, the recording has no more"
    return text
