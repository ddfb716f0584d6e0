"""What a planner is worth to a deployment: the busiest GPU of the steps that follow its plans, and the slots it writes.

    python -m bench.studies.serving --output PATH [--traces FOLDER] [--seeds 2001 2002 2003] [--all]

Rules: 60 s of balanced work; a layer's step takes as long as its busiest GPU; a written slot is an expert of BF16
DeepSeek-V3 over 900 GB/s. A plan is made `interval` + 1 steps after the last one was deployed, a layer a step. Score =
100 * time of DeepSeek's planner on the sum of the last 1024 steps, every 1024 steps / time. Six layers stand for all:
each comes into force in the middle of the steps in which those that it stands for do, one a step. Who replans gets as
many steps as the plan is for, but 256 at least, 8 for each of its 32 samples. That was fixed on seeds 1 to 3, against
128 to 4096 steps (up to 1 point less), before any seed that is reported here was drawn.
Recorded traffic: windows of 16 steps of 128 tokens, a plan on all steps so far, judged on the next window.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.planners.ours import Planner as Peer
from bench.planners.ours import probe
from bench.planners.peers import peers
from bench.serving_rules import CASES, LAYERS, STEPS, WEIGHTS, Case, price_of, simulate
from bench.style import figure, save
from eplb_triton import POLICIES, Placement, Planner, Topology
from eplb_triton.replay import Plan, Rules, Summary, replay_steps
from eplb_triton.synthetic import serving_steps

LAST = 1024
INTERVALS = (1024, 256, 64)
LEAST_STEPS = 256
BASELINE = ("deepseek", 1024)
WINDOW, TOKENS = 16, 128


def ours(policy: str, topology: Topology, num_experts: int, price: float | None, steps: int) -> Plan:
    """One of our policies: one that replans gets the newest `steps` and what is in force, the others the last 1024."""
    planners: dict[int, Planner] = {}

    def plan(history: Tensor, live: Placement | None) -> Placement:
        layers = history.shape[1]
        if layers not in planners:
            planners[layers] = Planner(topology, layers, num_experts, policy=policy, device="cpu")
        if POLICIES[policy].replan:
            return planners[layers](history[-steps:], previous=live, price=price if live is not None else None)
        return planners[layers](history[-LAST:])

    return plan


def of_peer(peer: Peer, topology: Topology) -> Plan:
    """A published planner, on the sum of the last 1024 steps."""
    return lambda history, live: peer.placement(history[-LAST:].sum(0).float(), topology)


def drawn(
    cases: Sequence[Case], names: Sequence[str], others: Sequence[Peer], seeds: Sequence[int], intervals: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for every planner, interval, case and seed."""
    rows = []
    for case, seed in itertools.product(cases, seeds):
        series = serving_steps(STEPS, LAYERS, case.num_experts, mixed=case.kind == "Mix", seed=seed)
        loads = torch.stack([step.float() for step in series])
        for interval in intervals:
            price, newest = price_of(case, interval), max(LEAST_STEPS, interval)
            wanted = names if interval != BASELINE[1] or BASELINE[0] in names else [BASELINE[0], *names]
            plans = {name: ours(name, case.topology, case.num_experts, price, newest) for name in wanted}
            plans |= {peer.name: of_peer(peer, case.topology) for peer in others}
            for name, plan in plans.items():
                row = {"planner": name, "interval": interval, "kind": case.kind, "gpus": case.num_gpus, "seed": seed}
                rows.append(row | simulate(case, loads, plan, interval))
                print(rows[-1], flush=True)
    return rows


def scores(rows: Sequence[dict[str, Any]], *, summed: bool = False) -> dict[tuple[str, int], float]:
    """By planner and interval: scores of the cases and seeds of a kind alike, kinds by their weights.

    summed: a kind's score is that of its cases' times together; the larger the case, the more it counts.
    """
    base = {_case(row): row["seconds"] for row in rows if (row["planner"], row["interval"]) == BASELINE}
    found: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        of_kinds = found.setdefault((row["planner"], row["interval"]), {})
        of_kinds.setdefault(row["kind"], []).append((base[_case(row)], row["seconds"]))

    def of_kind(times: list[tuple[float, float]]) -> float:
        if summed:
            return 100 * sum(before for before, _ in times) / sum(after for _, after in times)
        return statistics.fmean(100 * before / after for before, after in times)

    return {
        planner: sum(WEIGHTS[kind] * of_kind(times) for kind, times in of_kinds.items())
        / sum(WEIGHTS[kind] for kind in of_kinds)
        for planner, of_kinds in found.items()
    }


def _case(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["kind"], row["gpus"], row["seed"]


def recorded_steps(path: Path, *, mixed: bool) -> Iterator[Tensor]:
    """Loads [L, E] of steps of 128 tokens: consecutive ones, or one each of 128 streams that start evenly spaced."""
    with np.load(path) as arrays:
        ids = arrays["topk_ids"]
    order = np.arange(len(ids) // TOKENS * TOKENS)
    if mixed:
        order = order.reshape(TOKENS, -1).T.ravel()
    num_layers, num_experts = ids.shape[1], int(ids.max()) + 1
    offsets = num_experts * np.arange(num_layers)[None, :, None]
    for first in range(0, len(order), TOKENS):
        chosen = ids[order[first : first + TOKENS]].astype(np.int64) + offsets
        counts = np.bincount(chosen.ravel(), minlength=num_layers * num_experts)
        yield torch.from_numpy(counts.reshape(num_layers, num_experts)).float()


def on_traces(folder: Path, names: Sequence[str], others: Sequence[Peer]) -> list[dict[str, Any]]:
    """Per-step balancedness of the next window, and slots written a layer and plan, for every trace and planner."""
    rows = []
    for path in sorted(folder.glob("*.npz")):
        for mixed in (False, True):
            steps = list(recorded_steps(path, mixed=mixed))
            layers, experts = steps[0].shape
            slots = -(-experts * 5 // 4 // 16)
            topology = Topology(num_replicas=16 * slots, num_gpus=16)
            plans = {name: ours(name, topology, experts, None, len(steps)) for name in names}
            plans |= {peer.name: of_peer(peer, topology) for peer in others}
            for name, plan in plans.items():
                rules = Rules(WINDOW, layer_steps=0)
                summary = Summary.of(replay_steps(steps, None, plan, rules))
                changes = len(steps) // WINDOW - 1  # the first plan is none
                rows.append(
                    {
                        "trace": path.stem,
                        "steps": "mixed" if mixed else "chunks",
                        "planner": name,
                        "balancedness": summary.balancedness,
                        "slots": summary.written / max(changes, 1) / layers,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]]) -> str:
    """Scores by planner and interval, those of single seeds, then the traces, in Markdown."""
    found, summed = scores(rows), scores(rows, summed=True)
    intervals = sorted({at for _, at in found}, reverse=True)
    seeds = sorted({row["seed"] for row in rows})
    head = " | ".join(f"plans every {interval} steps" for interval in intervals)
    lines = [f"| planner | {head} | PAR | slots | ms a plan |", "|---|" + "---:|" * (len(intervals) + 3)]

    def cells(of: dict[tuple[str, int], float], name: str) -> str:
        return " | ".join(f"{of[name, at]:.1f}" if (name, at) in of else "–" for at in intervals)

    for name in dict.fromkeys(name for name, _ in found):
        means = [_means(rows, name, at) for at in intervals if (name, at) in found]
        shown = (" / ".join(f"{mean[k]:{form}}" for mean in means) for k, form in enumerate((".3f", ".0f", ".2f")))
        lines.append(f"| `{name}` | {cells(found, name)} | {' | '.join(shown)} |")
        if name == "steady":
            lines.append(f"| `{name}`, times of a kind summed | {cells(summed, name)} | | | |")
            for seed in seeds if len(seeds) > 1 else ():
                alone = scores([row for row in rows if row["seed"] == seed])
                lines.append(f"| `{name}`, seed {seed} | {cells(alone, name)} | | | |")
    if traces:
        head = "| trace | steps | planner | balancedness of the next window | slots written a layer and plan |"
        lines += ["", head, "|---|---|---|---:|---:|"]
    for row in traces:
        lines.append(
            f"| {row['trace']} | {row['steps']} | `{row['planner']}` | {row['balancedness']:.3f} | {row['slots']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _means(rows: Sequence[dict[str, Any]], name: str, interval: int) -> list[float]:
    """PAR, slots and ms a plan (six layers), means over cases and seeds."""
    chosen = [row for row in rows if (row["planner"], row["interval"]) == (name, interval)]
    return [statistics.fmean(row[value] for row in chosen) for value in ("par", "slots", "plan_ms")]


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PAR against slots written: a point a planner and interval, means over cases and seeds."""
    plot = figure(
        8, 5, "The busiest GPU against the weights moved", "means over the cases; numbers: steps between plans"
    )
    axes = plot.add_subplot()
    names = list(dict.fromkeys(row["planner"] for row in rows))
    for number, name in enumerate(names):
        intervals = [at for at in INTERVALS if any((row["planner"], row["interval"]) == (name, at) for row in rows)]
        points = [(slots, par) for par, slots, _ in (_means(rows, name, at) for at in intervals)]
        axes.plot(*zip(*points, strict=True), "o-", label=name, color=f"C{number % 10}")
        for (slots, par), interval in zip(points, intervals, strict=True):
            axes.annotate(str(interval), (slots, par), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xscale="log", xlabel="slots written in 6,144 steps", ylabel="PAR: largest / mean GPU load, of a step")
    axes.legend(frameon=False)
    save(plot, path)


def main() -> None:
    """Run, and write the three files."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--traces", type=Path, default=os.environ.get("EPLB_TRACES"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[2001, 2002, 2003])
    parser.add_argument("--intervals", type=int, nargs="*", default=INTERVALS, help="1024 is what is compared with")
    parser.add_argument("--planners", nargs="*", default=["deepseek", "balanced", "steady"])
    parser.add_argument("--gpus", type=int, nargs="*", help="only cases of so many GPUs")
    parser.add_argument("--all", action="store_true", help="every policy of ours, and every peer that can be loaded")
    arguments = parser.parse_args()
    names = list(POLICIES) if arguments.all else arguments.planners
    loaded, skipped = peers() if arguments.all else ([], [])
    others, broken = probe(loaded)
    cases = [case for case in CASES if not arguments.gpus or case.num_gpus in arguments.gpus]
    traces = on_traces(Path(arguments.traces), names, others) if arguments.traces else []
    rows = drawn(cases, names, others, arguments.seeds, arguments.intervals)
    body = {"rows": rows, "traces": traces, "skipped": [[skip.planner, skip.reason] for skip in [*skipped, *broken]]}
    arguments.output.with_suffix(".json").write_text(json.dumps(body, indent=1))
    arguments.output.with_suffix(".md").write_text(table(rows, traces))
    picture(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
