"""`make bench-next-window`: what a plan made on one window of a routing trace is worth on the next."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench import results, style, tables
from bench.machine import environment
from bench.planners.ours import SOURCE, Planner, Skip, best_backend, one_line, ours, probe
from bench.planners.peers import peers
from bench.progress import Steps
from bench.run import choose
from eplb_triton import Placement, Topology
from eplb_triton.formats import FormatError, Recording, read_loads

TOKENS = (500, 1000, 2000)
REDUNDANCY = 1.25
GPUS = 16


def topology_for(num_experts: int) -> Topology:
    """A quarter more replicas than experts, on `GPUS` GPUs, global: 64 experts make 80 replicas, 5 a GPU."""
    slots = -(-int(num_experts * REDUNDANCY) // GPUS)
    return Topology(num_replicas=slots * GPUS, num_gpus=GPUS)


def transitions(recordings: Sequence[Recording], tokens: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(`within` or `across`, loads planned, loads that follow) [L, E] float32, windows of `tokens`.

    Within a domain: every window and the next. Across: the last whole window of a domain, and the first of every
    other domain.
    """
    windows = [[_loads(recording, at, tokens) for at in range(recording.length // tokens)] for recording in recordings]
    for domain in windows:
        for planned, following in itertools.pairwise(domain):
            yield "within", planned, following
    for before, after in itertools.permutations([domain for domain in windows if domain], 2):
        yield "across", before[-1], after[0]


def _loads(recording: Recording, at: int, tokens: int) -> Tensor:
    return recording.loads(at * tokens, (at + 1) * tokens).to(torch.float32)


def study(planner: Planner | None, pairs: Sequence[tuple[str, Tensor, Tensor]], topology: Topology) -> dict[str, Any]:
    """Balancedness on the planned and on the following window, and experts fetched to replan, of each kind of pair.

    Without a planner: experts spread in order.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for kind, planned, following in pairs:
        layers, experts = planned.shape
        if planner is None:
            old = new = Placement.spread_in_order(layers, experts, topology)
        else:
            old, new = planner.placement(planned, topology), planner.placement(following, topology)
        row = found.setdefault(kind, {"planned": [], "following": [], "replanned": [], "fetched": []})
        row["planned"].append(old.balancedness(planned))
        row["following"].append(old.balancedness(following))
        row["replanned"].append(new.balancedness(following))
        row["fetched"].append(int(new.moved(old).fetches.sum()) / new.phy2log.numel())
    return {
        kind: {
            "pairs": len(row["planned"]),
            **{name: {"mean": statistics.fmean(values), "values": values} for name, values in row.items()},
        }
        for kind, row in found.items()
    }


def table(result: dict[str, Any]) -> str:
    """Balancedness on the window that was planned, on the one after it, and what replanning moves."""
    rows = []
    for row in result["rows"]:
        for kind in ("within", "across"):
            if kind not in row:
                continue
            found = row[kind]
            means = [f"{found[key]['mean']:.4f}" for key in ("planned", "following", "replanned")]
            fetched = f"{100 * found['fetched']['mean']:.1f}"
            kinds = {"within": "same domain", "across": "change of domain"}
            rows.append([f"`{row['planner']}`", str(row["tokens"]), kinds[kind], str(found["pairs"]), *means, fetched])
    header = [
        "planner",
        "tokens",
        "next window",
        "pairs",
        "on its window",
        "on the next",
        "next, replanned",
        "fetched %",
    ]
    topology, model = result["topology"], result["model"]
    note = (
        f"{result['balancedness'][0].upper()}{result['balancedness'][1:]}; means over the pairs of windows. "
        f"Traces {', '.join(result['domains'])}: {model['layers']} layers, {model['experts']} experts on "
        f"{topology['num_replicas']} replicas, {topology['num_gpus']} GPUs. Fetched: experts that a GPU must fetch to "
        "come from the plan of the one window to the plan of the next, share of all slots."
    )
    return tables.with_skips(result, f"{tables.table(header, rows)}\n\n{note}")


def picture(result: dict[str, Any], path: Path) -> None:
    """Balancedness on the planned window, and on the next one of the same and of another domain."""
    rows = result["rows"]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    planners = list(dict.fromkeys(row["planner"] for row in rows))
    made = style.figure(5.0 * len(tokens) + 1.5, 1.8 + 0.42 * len(planners), "A plan meets the next window")
    panels = made.subplots(1, len(tokens), sharey=True, sharex=True, squeeze=False)[0]
    looks = {
        "on the window it was made for": ("within", "planned", "o", "white"),
        "on the next window, same domain": ("within", "following", "o", None),
        "on the next window, other domain": ("across", "following", "X", None),
    }
    for axes, size in zip(panels, tokens, strict=True):
        for row in (row for row in rows if row["tokens"] == size):
            height = planners.index(row["planner"])
            colour, _ = style.look(row["planner"])
            means = [row[kind][key]["mean"] for kind, key, _, _ in looks.values() if kind in row]
            axes.plot([min(means), max(means)], [height, height], color=colour, alpha=0.35)
            for kind, key, marker, face in looks.values():
                if kind in row:
                    mean = row[kind][key]["mean"]
                    axes.plot(mean, height, marker, color=colour, markersize=8, markerfacecolor=face or colour)
        axes.set_xlabel("balancedness (1 is perfect)")
        style.tidy(axes, f"windows of {size} tokens")
    panels[0].set_yticks(range(len(planners)), planners)
    panels[0].set_ylim(len(planners) - 0.5, -0.5)
    handles = [
        panels[0].plot(
            [], [], marker, color=style.PLAIN, markersize=8, markerfacecolor=face or style.PLAIN, label=text
        )[0]
        for text, (_, _, marker, face) in looks.items()
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    style.save(made, path)


@click.command()
@click.option(
    "--traces", type=click.Path(path_type=Path, exists=True, file_okay=False), envvar="EPLB_TRACES", required=True
)
@click.option("--planners", default="", help="comma-separated names or globs; as `make bench` has them")
@click.option("--out", type=click.Path(path_type=Path), help="folder of the results")
def main(traces: Path, planners: str, out: Path | None) -> None:
    """Judge plans on the window after the one they were made on: within a domain, and across a change of domain."""
    found = environment("bench.studies.next_window")
    loaded, skips = peers()
    working, broken = probe([*ours(), *loaded])
    skips += broken
    try:
        chosen = choose(working, planners)
        recordings = [read_loads(path, kind="topk_ids") for path in sorted(traces.glob("*.npz"))]
    except (ValueError, FormatError) as error:
        raise click.UsageError(str(error)) from error
    if len({(recording.num_layers, recording.num_experts) for recording in recordings}) != 1:
        raise click.UsageError(
            f"{traces} must hold .npz routing traces of one model, found {len(recordings)} of several"
        )
    topology = topology_for(recordings[0].num_experts)
    best = best_backend(chosen)  # backends give the same maps: one line stands for a policy
    everyone = [None, *(row for row in chosen if row.source != SOURCE or row.name.endswith(f"@{best}"))]
    rows = []
    with Steps(len(TOKENS) * len(everyone)) as steps:
        for tokens in TOKENS:
            pairs = list(transitions(recordings, tokens))
            for planner in everyone:
                name = planner.name if planner else style.UNPLANNED
                steps.begin(f"{tokens} tokens: {name}")
                try:
                    rows.append({"tokens": tokens, "planner": name, **study(planner, pairs, topology)})
                except Exception as error:  # a peer may raise anything; it becomes a line of the report
                    skips.append(Skip(name, one_line(error), f"{tokens} tokens"))
    body = {
        "domains": [recording.path.stem for recording in recordings],
        "model": {"layers": recordings[0].num_layers, "experts": recordings[0].num_experts},
        "topology": asdict(topology),
        "skipped": [asdict(skip) for skip in skips],
        "rows": rows,
    }
    results.publish("next-window", found, body, out)


if __name__ == "__main__":
    main()
