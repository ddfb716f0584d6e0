"""What a planner is worth to a deployment: the busiest GPU of the steps that follow its plans, and the slots it writes.

    python -m bench.studies.serving --output PATH [--traces FOLDER] [--seeds 1] [--all]     (.json, .md, .png)

Rules: 60 s of balanced work; a layer's step takes as long as its busiest GPU; a written slot is an expert of BF16
DeepSeek-V3 over 900 GB/s. A plan is made `interval` + 1 steps after the last one was deployed, a layer a step. Score =
100 * time of DeepSeek's planner on the sum of the last 1024 steps, every 1024 steps / time. Six layers stand for all.
Recorded traffic: windows of 16 steps of 128 tokens, a plan on all steps so far, judged on the next window.
"""

from __future__ import annotations

import json
import os
import statistics
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.planners.ours import Planner as Peer
from bench.planners.ours import probe
from bench.planners.peers import peers
from bench.style import figure, save
from eplb_triton import POLICIES, Placement, Planner, Topology
from eplb_triton.replans import replan_price
from eplb_triton.replay import Plan, Rules, Summary, replay_steps
from eplb_triton.synthetic import serving_steps

BALANCED_SECONDS, SLOT_BYTES, BANDWIDTH = 60.0, 88_080_384, 900e9
STEPS, LAYERS, LAST = 6144, 6, 1024
INTERVALS = (1024, 256, 64)
BASELINE, BASELINE_INTERVAL = "deepseek", 1024
WINDOW, TOKENS = 16, 128


class Case(NamedTuple):
    """Drawn traffic of a model on some GPUs; cases of a kind share its weight in the composite."""

    kind: str
    num_layers: int
    num_experts: int
    num_gpus: int

    @property
    def topology(self) -> Topology:
        """As many redundant slots as GPUs."""
        return Topology(num_replicas=self.num_experts + self.num_gpus, num_gpus=self.num_gpus)

    @property
    def start(self) -> Placement:
        """Experts in order over the GPUs; the last slot of each repeats the one before."""
        gpus, slots = self.num_gpus, self.topology.slots_per_gpu
        table = torch.arange(gpus).unsqueeze(1) * (slots - 1) + torch.arange(slots - 1)
        table = torch.cat((table, table[:, -1:]), 1).flatten() % self.num_experts
        return Placement.from_phy2log(table.repeat(LAYERS, 1), self.num_experts, self.topology)


WEIGHTS = {"R1": 3, "Mix": 1, "Qwen3": 3}
CASES = (
    *(Case("R1", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Mix", 58, 256, gpus) for gpus in (32, 64, 128, 256)),
    *(Case("Qwen3", 94, 128, gpus) for gpus in (32, 64, 128)),
)


def ours(policy: str, topology: Topology, num_experts: int, price: float | None) -> Plan:
    """One of our policies: those that replan get every step and the placement in force, the others the last 1024."""
    planners: dict[int, Planner] = {}

    def plan(history: Tensor, live: Placement | None) -> Placement:
        layers = history.shape[1]
        if layers not in planners:
            planners[layers] = Planner(topology, layers, num_experts, policy=policy, device="cpu")
        if POLICIES[policy].replan:
            return planners[layers](history, previous=live, price=price if live is not None else None)
        return planners[layers](history[-LAST:])

    return plan


def of_peer(peer: Peer, topology: Topology) -> Plan:
    """A published planner, on the sum of the last 1024 steps."""
    return lambda history, live: peer.placement(history[-LAST:].sum(0).float(), topology)


def simulate(case: Case, plan: Plan, interval: int, seed: int) -> dict[str, float]:
    """PAR, slots written (of all layers) and modelled seconds of one planner on one case."""
    steps = serving_steps(STEPS, LAYERS, case.num_experts, mixed=case.kind == "Mix", seed=seed)
    rules = Rules(interval, layer_steps=case.num_layers / LAYERS, least_load=1)
    summary = Summary.of(replay_steps((step.float() for step in steps), case.start, plan, rules))
    slots = summary.written * case.num_layers / LAYERS
    return {
        "par": summary.peak_over_mean,
        "slots": slots,
        "seconds": BALANCED_SECONDS * summary.peak_over_mean + slots * SLOT_BYTES / BANDWIDTH,
        "plan_ms": 1e3 * statistics.median(summary.plan_seconds) if summary.plan_seconds else 0.0,
    }


def price_of(case: Case, interval: int) -> float:
    """By the rules: the balanced time of a layer's step, and the steps that a plan serves."""
    return replan_price(SLOT_BYTES, BANDWIDTH, BALANCED_SECONDS / (STEPS * case.num_layers), interval)


def drawn(cases: Sequence[Case], names: Sequence[str], others: Sequence[Peer], seeds: int) -> list[dict[str, Any]]:
    """A row for every planner, interval, case and seed."""
    rows = []
    for case in cases:
        for seed in range(seeds):
            for interval in INTERVALS:
                plans = {name: ours(name, case.topology, case.num_experts, price_of(case, interval)) for name in names}
                plans |= {peer.name: of_peer(peer, case.topology) for peer in others}
                for name, plan in plans.items():
                    row = {"planner": name, "interval": interval, "kind": case.kind, "gpus": case.num_gpus}
                    rows.append({**row, "seed": seed, **simulate(case, plan, interval, 1000 + seed)})
                    print(rows[-1], flush=True)
    return rows


def scores(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """By planner and interval: kinds by their weights, cases and seeds of a kind alike."""
    key = ("kind", "gpus", "seed")
    base = {
        tuple(row[name] for name in key): row["seconds"]
        for row in rows
        if (row["planner"], row["interval"]) == (BASELINE, BASELINE_INTERVAL)
    }
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        of_kinds = found.setdefault((row["planner"], row["interval"]), {})
        score = 100 * base[tuple(row[name] for name in key)] / row["seconds"]
        of_kinds.setdefault(row["kind"], []).append(score)
    return {
        planner: sum(WEIGHTS[kind] * statistics.fmean(values) for kind, values in of_kinds.items())
        / sum(WEIGHTS[kind] for kind in of_kinds)
        for planner, of_kinds in found.items()
    }


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
            plans = {name: ours(name, topology, experts, None) for name in names}
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
    """Scores by planner and interval, then the traces, in Markdown."""
    found = scores(rows)
    names = list(dict.fromkeys(name for name, _ in found))
    lines = [
        "| planner | " + " | ".join(f"plans every {interval} steps" for interval in INTERVALS) + " |",
        "|---|" + "---:|" * len(INTERVALS),
        *(f"| `{name}` | " + " | ".join(f"{found[name, at]:.1f}" for at in INTERVALS) + " |" for name in names),
        "",
        "| trace | steps | planner | balancedness of the next window | slots written a layer and plan |",
        "|---|---|---|---:|---:|",
    ]
    for row in traces:
        lines.append(
            f"| {row['trace']} | {row['steps']} | `{row['planner']}` | {row['balancedness']:.3f} | {row['slots']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PAR against slots written: a point a planner and interval, means over cases and seeds."""
    plot = figure(8, 5, "The busiest GPU against the weights moved", "points: plans every 1024, 256, 64 steps")
    axes = plot.add_subplot()
    names = list(dict.fromkeys(row["planner"] for row in rows))
    for number, name in enumerate(names):
        points = []
        for interval in INTERVALS:
            chosen = [row for row in rows if (row["planner"], row["interval"]) == (name, interval)]
            points.append(tuple(statistics.fmean(row[value] for row in chosen) for value in ("slots", "par")))
        axes.plot(*zip(*points, strict=True), "o-", label=name, color=f"C{number}")
        for (slots, par), interval in zip(points, INTERVALS, strict=True):
            axes.annotate(str(interval), (slots, par), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xscale="log", xlabel="slots written in 6,144 steps", ylabel="PAR: largest / mean GPU load, of a step")
    axes.legend(frameon=False)
    save(plot, path)


def main() -> None:
    """Run, and write the three files."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--traces", type=Path, default=os.environ.get("EPLB_TRACES"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--planners", nargs="*", default=["deepseek", "balanced", "steady"])
    parser.add_argument("--gpus", type=int, nargs="*", help="only cases of so many GPUs")
    parser.add_argument("--all", action="store_true", help="every policy of ours, and every peer that can be loaded")
    arguments = parser.parse_args()
    names = list(POLICIES) if arguments.all else arguments.planners
    loaded, skipped = peers() if arguments.all else ([], [])
    others, broken = probe(loaded)
    cases = [case for case in CASES if not arguments.gpus or case.num_gpus in arguments.gpus]
    traces = on_traces(Path(arguments.traces), names, others) if arguments.traces else []
    rows = drawn(cases, names, others, arguments.seeds)
    body = {"rows": rows, "traces": traces, "skipped": [[skip.planner, skip.reason] for skip in [*skipped, *broken]]}
    arguments.output.with_suffix(".json").write_text(json.dumps(body, indent=1))
    arguments.output.with_suffix(".md").write_text(table(rows, traces))
    picture(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
