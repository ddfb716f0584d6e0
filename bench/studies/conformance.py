"""`make bench-conformance`: golden and random cases through every backend, and through peers of the algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench import results, tables
from bench.machine import ROOT, environment
from bench.planners.ours import PUBLISHED, SOURCE, Planner, Skip, one_line, ours, probe
from bench.planners.peers import VLLM, peers
from bench.progress import Steps
from bench.quality import causes, same_layers
from bench.studies import vector_units
from eplb_triton import POLICIES, Placement, Topology, plan
from eplb_triton.synthetic import Family, load_windows

GOLDEN = ROOT / "tests" / "golden"
DEEPSEEK = "sglang"
"""The peer that is a copy of the published DeepSeek code: what the others are compared with."""
_VARIANTS = ("sglang-vec",)
"""Peers that say they vary that algorithm."""


KINDS: dict[str, Family] = {
    "random, tie-free": "drift",
    "random, few tokens": "ties",
    "random, tie-free, a hot group": "hot-group",
    "random, many idle experts": "idle",
}
"""Of random examples, and what their loads are drawn as."""


@dataclass
class Tally:
    """Layers of one planner that were compared, and in what they differ."""

    layers: int = 0
    equal_counts: int = 0
    equal_maps: int = 0
    refused: int = 0  # layers of calls that raised
    causes: dict[str, int] = field(default_factory=dict)  # of the layers whose maps differ

    def compare(self, got: Placement, want: Placement, loads: Tensor) -> None:
        """Count the layers of `got` that equal `want` as plans do, and why the others do not."""
        counts, maps = same_layers(got, want)
        self.layers += len(maps)
        self.equal_counts += int(counts.sum())
        self.equal_maps += int(maps.sum())
        for cause in causes(loads[~maps], want.logcnt[~maps], want.topology):
            self.causes[cause] = self.causes.get(cause, 0) + 1


@dataclass(frozen=True)
class Example:
    """Loads [L, E], a topology, and where they come from: `golden` or `random, with ties`, ..."""

    kind: str
    loads: Tensor
    topology: Topology


def random_cases(count: int, seed: int) -> Iterator[Example]:
    """`count` examples of 3 layers, E up to 192; half of them without ties, half hierarchical."""
    random = np.random.default_rng(seed)
    for at in range(count):
        kind = list(KINDS)[at % len(KINDS)]
        topology, experts = _cluster(random, hierarchical=at // len(KINDS) % 2 == 1)
        loads = load_windows(KINDS[kind], 1, 3, experts, seed=int(random.integers(1 << 32)))[0]
        yield Example(kind, loads, topology)


def _cluster(random: np.random.Generator, *, hierarchical: bool) -> tuple[Topology, int]:
    """A topology and E that fit each other, drawn so that no draw is thrown away."""
    nodes = int(random.choice([2, 4])) if hierarchical else 1
    groups = nodes * int(random.integers(1, 5)) if hierarchical else 1
    gpus = nodes * int(random.integers(1, 9))
    experts = groups * int(random.integers(1, max(2, 192 // groups)))
    slots = -(-experts // gpus) + int(random.integers(0, 3))
    return Topology(num_replicas=slots * gpus, num_gpus=gpus, num_groups=groups, num_nodes=nodes), experts


def golden_examples() -> Iterator[tuple[Example, str, str, Tensor, Tensor]]:
    """(example, file, policy, phy2log, logcnt) of every plan in the golden files; stacked calls one by one."""
    for file in ("placements", "exact"):
        with np.load(GOLDEN / f"{file}.npz") as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
        for case in sorted({name.partition("/")[0] for name in arrays}):
            experts, replicas, groups, nodes, gpus = arrays[f"{case}/topology"].tolist()
            topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
            weight = arrays[f"{case}/weight"]
            for policy in POLICIES:
                if f"{case}/{policy}/phy2log" not in arrays:
                    continue
                maps = arrays[f"{case}/{policy}/phy2log"].long().reshape(-1, *weight.shape[-2:-1], replicas)
                counts = arrays[f"{case}/{policy}/logcnt"].long().reshape(-1, *weight.shape[-2:-1], experts)
                for loads, phy2log, logcnt in zip(weight.reshape(-1, *weight.shape[-2:]), maps, counts, strict=True):
                    yield Example(f"golden {file}", loads, topology), file, policy, phy2log, logcnt


def backends_on_golden(planners: Sequence[Planner]) -> dict[str, dict[str, dict[str, int]]]:
    """Of each file and planner of ours: layers, and layers equal to the golden plan (exact: slot by slot)."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for example, file, policy, phy2log, logcnt in golden_examples():
        want = Placement.from_phy2log(phy2log, example.loads.shape[1], example.topology)
        for planner in planners:
            if planner.algorithm != policy:
                continue
            got = planner.bind(example.loads, example.topology)()
            if file == "exact":
                equal = (got.phy2log.cpu() == phy2log).all(1) & (got.logcnt.cpu() == logcnt).all(1)
            else:
                equal = same_layers(Placement.from_phy2log(got.phy2log.cpu(), want.num_experts, want.topology), want)[1]
            row = table.setdefault(file, {}).setdefault(planner.name, {"layers": 0, "equal": 0})
            row["layers"] += len(equal)
            row["equal"] += int(equal.sum())
    return table


def backends_on_random(planners: Sequence[Planner], examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Of each planner of ours: layers, and layers equal to the reference's, slot by slot and rank by rank."""
    table: dict[str, dict[str, int]] = {}
    others = [planner for planner in planners if not planner.name.endswith("@reference")]
    for example in examples:
        for policy in dict.fromkeys(planner.algorithm for planner in others):
            want = plan(example.loads, example.topology, policy=policy, backend="reference")
            for planner in others:
                if planner.algorithm != policy:
                    continue
                got = planner.bind(example.loads, example.topology)()
                pairs = ((got.phy2log, want.phy2log), (got.phyrank, want.phyrank), (got.logcnt, want.logcnt))
                equal = torch.stack([(mine.cpu() == theirs).all(1) for mine, theirs in pairs]).all(0)
                row = table.setdefault(planner.name, {"layers": 0, "equal": 0})
                row["layers"] += len(equal)
                row["equal"] += int(equal.sum())
    return table


def against_deepseek(planners: Sequence[Planner], examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Of each kind of example and planner: how its plans compare with DeepSeek's own, and on what they differ."""
    (deepseek,) = [planner for planner in planners if planner.name == DEEPSEEK]
    tallies: dict[str, dict[str, Tally]] = {}
    for example in examples:
        want = deepseek.placement(example.loads, example.topology)
        for planner in planners:
            if planner is deepseek:
                continue
            tally = tallies.setdefault(example.kind, {}).setdefault(planner.name, Tally())
            try:
                tally.compare(planner.placement(example.loads, example.topology), want, example.loads)
            except Exception:  # a peer may refuse a topology in any way: its layers are counted as refused
                tally.refused += len(example.loads)
    return {kind: {name: asdict(tally) for name, tally in rows.items()} for kind, rows in tallies.items()}


def golden_table(result: dict[str, Any]) -> str:
    """Layers in which our backends give the golden plans, and the reference's on random cases."""
    rows = []
    for file, found in result["golden"].items():
        for name, row in found.items():
            rows.append([f"golden, {file}", f"`{name}`", f"{row['equal']} / {row['layers']}"])
    for name, row in result["backends"].items():
        rows.append([f"{result['random']} random, as the reference", f"`{name}`", f"{row['equal']} / {row['layers']}"])
    note = (
        "`placements`: counts and, on every node, the experts of its GPUs; `exact` and random: slot by slot. "
        "Layers without a plan in a golden file are not counted."
    )
    return f"{tables.table(['plans', 'planner', 'equal layers'], rows)}\n\n{note}"


def peers_table(result: dict[str, Any]) -> str:
    """How peers, and our reference, compare with DeepSeek's published code, and on what they differ."""
    if "peers" not in result:
        return ""
    rows = []
    for kind, found in result["peers"].items():
        for name, row in found.items():
            rows.append([kind, f"`{name}`", *tables.layers(row), str(row["refused"])])
    header = ["loads", "planner", "layers with its counts", "with its maps", "layers that differ, by cause", "refused"]
    note = (
        "Compared with SGLang's copy of DeepSeek's code. `sglang-vec` is a variant of the algorithm: it differs "
        f"whatever the loads. {tables.causes_note()}"
    )
    return tables.with_skips(result, f"{tables.table(header, rows)}\n\n{note}")


@click.command()
@click.option("--random", "count", default=1000, show_default=True, help="random cases")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="folder of the results")
def main(count: int, seed: int, out: Path | None) -> None:
    """Compare backends with the golden plans and with each other, and peers with DeepSeek's published code."""
    found = environment("bench.studies.conformance")
    torch.set_num_threads(1)  # the cases are small: a second thread doubles the time on two busy cores
    loaded, skips = peers()
    working, broken = probe([*ours(), *loaded])
    skips += broken
    mine = [planner for planner in working if planner.source == SOURCE and "+" not in planner.name]
    names = {DEEPSEEK, VLLM, *_VARIANTS, f"{PUBLISHED}@reference"}
    rivals = [planner for planner in working if planner.name in names]
    examples = list(random_cases(count, seed))
    body: dict[str, Any] = {"random": count, "seed": seed}
    with Steps(4) as steps:
        steps.begin("golden plans")
        body["golden"] = backends_on_golden(mine)
        steps.begin(f"{count} random cases, all backends")
        body["backends"] = backends_on_random(mine, examples)
        if DEEPSEEK in {planner.name for planner in working}:
            steps.begin(f"{count} random cases, peers")
            golden = [example for example, _, policy, _, _ in golden_examples() if policy == PUBLISHED]
            body["peers"] = against_deepseek(rivals, [*golden, *examples])
        if VLLM in {planner.name for planner in working}:
            steps.begin("vector units")
            try:
                body["vector_units"] = vector_units.compare()
            except vector_units.UnavailableError as error:
                skips.append(Skip("vector units", one_line(error)))
    results.publish("conformance", found, {**body, "skipped": [asdict(skip) for skip in skips]}, out)


if __name__ == "__main__":
    main()
