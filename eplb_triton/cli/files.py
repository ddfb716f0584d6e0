"""The commands about placement files of any format: convert, diff."""

from __future__ import annotations

from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.cli import words
from eplb_triton.cli.options import Counts
from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.cli.terminal import console, say
from eplb_triton.formats import NEED_GPUS, PlanFile, SlotMap, check_map_path, read_map, write_map
from eplb_triton.printing import printable, shown

DIFFERENT = 1
"""Exit status of `diff` where two plans differ."""


def convert(path: Path, output: Path, to: str, counts: Counts, experts: int | None, first_layer: int | None) -> None:
    """Write the placement in IN to OUT in another format."""
    with refusing():
        check_map_path(output, to)
        stored = read_map(path, experts)
    placement = _placement(stored, counts, needs_gpus=to in NEED_GPUS, why=f"--to {to}")
    if first_layer is None:
        first_layer = stored.first_layer if isinstance(stored, SlotMap) else 0
    with refusing(output):
        write_map(output, placement, to, first_layer=first_layer)
    out = console()
    read_as = stored.format if isinstance(stored, SlotMap) else "plan"
    say(out, f"{shown(path)}: {read_as}, {words.counted(placement.num_layers, 'layer')}", "bold")
    say(out, f"{placement.topology.num_replicas} replicas of {words.counted(placement.num_experts, 'expert')}")
    say(out, f"wrote {shown(output)}: {to}", "bold")


def diff(first: Path, second: Path, counts: Counts, experts: int | None) -> int:
    """What changes from one placement to another; exit status 1 if anything does."""
    with refusing():
        stored = [read_map(path, experts) for path in (first, second)]
    topologies = [file.topology for file in stored if isinstance(file, PlanFile)]
    if topologies and counts.gpus is None:  # a file without counts is taken to be of the other's cluster
        known = topologies[0]
        counts = Counts(None, known["num_gpus"], known["num_nodes"], known["num_groups"])
    live, ahead = (_placement(file, counts, needs_gpus=True, why="diff") for file in stored)
    if (live.topology, live.logcnt.shape) != (ahead.topology, ahead.logcnt.shape):
        sizes = [f"{words.topology_words(p.topology, p.num_experts)}, {p.num_layers} layers" for p in (live, ahead)]
        raise Refused(f"{shown(second)}: expected {sizes[0]} like {shown(first)}; found {sizes[1]}")
    out = console()
    say(out, words.topology_words(ahead.topology, ahead.num_experts))
    moved = ahead.moved(live)
    if not int(moved.slots.sum()):
        say(out, f"{shown(first)} and {shown(second)}: the same expert in every slot", "bold")
        return 0
    fetched, between = fetches(live, ahead)
    slots = ahead.topology.num_replicas * ahead.num_layers
    say(out, f"{int(moved.slots.sum()):,} of {slots:,} slots change, in {int((moved.slots > 0).sum())} layers", "bold")
    say(out, f"{int(fetched.sum()):,} experts fetched by GPUs, {int(between.sum()):,} of them from another node")
    _print_rows(out, "layer", [moved.slots, fetched.sum(1), between.sum(1)])
    by_gpu = (ahead.phy2log != live.phy2log).view(ahead.num_layers, ahead.topology.num_gpus, -1).sum((0, 2))
    _print_rows(out, "GPU", [by_gpu, fetched.sum(0), between.sum(0)])
    return DIFFERENT


def fetches(live: Placement, ahead: Placement) -> tuple[Tensor, Tensor]:
    """[L, D] int64 twice: experts that each GPU must fetch, and those of them that no GPU of its node held before."""
    topology = ahead.topology
    nodes = topology.num_nodes if topology.num_gpus % topology.num_nodes == 0 else 1
    before, after = (_held(placement) for placement in (live, ahead))
    new = after & ~before
    on_node = before.view(len(before), nodes, -1, before.shape[2]).any(2, keepdim=True)
    far = new.view(len(new), nodes, -1, new.shape[2]) & ~on_node
    return new.sum(2), far.sum(3).view(len(new), -1)


def _held(placement: Placement) -> Tensor:
    """[L, D, E] bool: whether a GPU holds an expert."""
    layers, gpus = placement.num_layers, placement.topology.num_gpus
    held = torch.zeros(layers, gpus, placement.num_experts, dtype=torch.bool)
    return held.scatter_(2, placement.phy2log.view(layers, gpus, -1), True)


def _print_rows(out: Console, of: str, columns: list[Tensor]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (of, "slots\nchanged", "experts\nfetched", "from another\nnode"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if any(row):
            table.add_row(str(index), *(f"{value:,}" for value in row))
    out.print(table)


def _placement(stored: PlanFile | SlotMap, counts: Counts, *, needs_gpus: bool, why: str) -> Placement:
    """The placement in a file, of its own counts or of those given; a refusal where they contradict each other."""
    if isinstance(stored, PlanFile):
        with refusing():
            placement = stored.placement()
        counts.of(placement.topology, stored.path)
        return placement
    known = {"replicas": stored.phy2log.shape[1], "gpus": stored.num_gpus}
    for name, value in known.items():
        given = getattr(counts, name)
        if value is not None and given not in (None, value):
            raise Refused(f"--{name} {given} must be {value} or left out, as in {shown(stored.path)}")
    gpus = stored.num_gpus or counts.gpus
    if gpus is None and needs_gpus:
        raise Refused(f"{shown(stored.path)}: {printable(stored.format)} says no number of GPUs, {why} needs --gpus D")
    topology: Topology = Counts(known["replicas"], gpus or 1, counts.nodes, counts.groups).topology()
    with refusing():
        return stored.placement(topology)
