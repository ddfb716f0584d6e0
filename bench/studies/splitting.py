"""What splitting the tokens of a step is worth: per-step balancedness by split and placement, beside the optimum.

    python -m bench.studies.splitting --traces FOLDER --output PATH     (.json, .md and .png are written)

A placement is made from a window of 16 steps and serves the next 16; balancedness = mean GPU load / largest, each
summed over those steps and layers. A table is made from the 16 steps before each one and used evenly; the split of the
step itself knows its counts. The optimum is that of a linear program, in fractions of tokens: how much lower its peaks
are is taken from every fourth step. Times: all layers of a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.serving_traces import side_by_side
from bench.style import figure
from eplb_triton import Placement, Topology, plan
from eplb_triton.serving.dispatch import classify, split, split_bound, table
from eplb_triton.synthetic import lognormal_series

WINDOW = 16  # steps
WIDTH = 16  # entries of a table
BOUND_EVERY = 4  # steps: a linear program takes 100 times a split
ROUNDS = 8
SPLITS = ("even", "table", "in the step", "optimum")
COLOURS = ("#7F7F7F", "#E69F00", "#0072B2", "#555555")


class Case(NamedTuple):
    """Steps [T, L, E] of tokens, and the GPUs that serve them."""

    name: str
    steps: Tensor
    topology: Topology


def _replan(history: Tensor, topology: Topology, before: Placement | None) -> Placement:
    return plan(history, topology, policy="balanced" if before is None else None, previous=before)


PLACEMENTS: dict[str, Callable[[Tensor, Topology, Placement | None], Placement]] = {
    "balanced": lambda history, topology, _: plan(history.sum(0), topology, policy="balanced"),
    "replanned": _replan,
}


def recorded(folder: Path) -> Iterator[Case]:
    """The traces of `folder`: chunks of 128 consecutive tokens, or a token each of 128 sequences side by side."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            ids, lengths = arrays["topk_ids"], arrays["seq_len"]
        decode = "decode" in path.stem
        experts = 32 if decode else 64
        order = side_by_side(lengths, 128) if decode else np.arange(len(ids))
        order = order[: len(order) // 128 * 128].reshape(-1, 128)
        steps = np.stack([_count(ids[tokens], experts) for tokens in order])
        topology = Topology(num_replicas=40, num_gpus=8) if decode else Topology(num_replicas=80, num_gpus=16)
        yield Case(path.stem, torch.from_numpy(steps), topology)


def drawn(num_steps: int = 64, num_layers: int = 6) -> Case:
    """Layers shaped like DeepSeek-V3's, 4,096 tokens a step."""
    steps = lognormal_series(num_steps, num_layers, tokens_per_step=4096)
    return Case("drawn V3", steps, Topology(num_replicas=288, num_gpus=32))


def _count(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L, E] of ids [tokens, L, k]."""
    layers = np.arange(ids.shape[1])[:, None]
    flat = ids.astype(np.int64).transpose(1, 0, 2).reshape(ids.shape[1], -1) + layers * experts
    return np.bincount(flat.reshape(-1), minlength=ids.shape[1] * experts).reshape(-1, experts)


def judge(case: Case, make: Callable[[Tensor, Topology, Placement | None], Placement]) -> dict[str, float]:
    """Balancedness of every split, of all windows but the first, and the seconds of a split and of its optimum."""
    peaks, means, seconds = dict.fromkeys(SPLITS[:3], 0.0), 0.0, {"split": 0.0, "linear program": 0.0}
    placement, splits, bounds, sampled = None, 0, 0.0, 0.0
    for start in range(WINDOW, len(case.steps) - WINDOW + 1, WINDOW):
        placement = make(case.steps[start - WINDOW : start], case.topology, placement)
        slots, experts = placement.phy2log, case.steps.shape[2]
        classes = classify(slots, experts, case.topology)
        for at in range(start, start + WINDOW):
            counts, topology = case.steps[at], case.topology
            means += float(counts.sum()) / topology.num_gpus
            recent = split(case.steps[at - WINDOW : at].sum(0), slots, classes, topology, rounds=ROUNDS)
            began = time.perf_counter()
            now = split(counts, slots, classes, topology, rounds=ROUNDS)
            seconds["split"] += time.perf_counter() - began
            splits += 1
            shares = {
                "even": split(counts, slots, classes, topology, rounds=0).double(),
                "table": _by_table(counts, table(recent, WIDTH, slots, experts, topology), topology),
                "in the step": now.double(),
            }
            for name, load in shares.items():
                peak = float(load.view(len(counts), topology.num_gpus, -1).sum(2).amax(1).sum())
                peaks[name] += peak
            if at % BOUND_EVERY == 0:
                began = time.perf_counter()
                bounds += float(split_bound(counts, slots, topology).sum())
                seconds["linear program"] += (time.perf_counter() - began) * BOUND_EVERY
                sampled += peak  # of the split of the step itself
    found = {name: means / peak for name, peak in peaks.items()}
    found["optimum"] = found["in the step"] * sampled / bounds
    return found | {f"ms of a {name}": 1e3 * total / max(splits, 1) for name, total in seconds.items()}


def _by_table(counts: Tensor, entries: Tensor, topology: Topology) -> Tensor:
    """[L, P] float64: tokens of each slot where every entry of a table gets the same share."""
    layers, _, width = entries.shape
    share = (counts.double() / width).unsqueeze(2).expand(entries.shape)
    return torch.zeros(layers, topology.num_replicas, dtype=torch.float64).scatter_add_(
        1, entries.clamp(min=0).view(layers, -1), share.reshape(layers, -1)
    )


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each trace and placement."""
    lines = [
        f"| loads | placement | even | table of {WIDTH}, last {WINDOW} steps | in the step | optimum | ms of a split | "
        "ms of a linear program |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, placements in results.items():
        for name, found in placements.items():
            shares = " | ".join(f"{found[kind]:.3f}" for kind in SPLITS)
            times = f"{found['ms of a split']:.2f} | {found['ms of a linear program']:.0f}"
            lines.append(f"| {case} | {name} | {shares} | {times} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """A group of bars for each trace and placement; the optimum as a line above each."""
    made = figure(11, 5, "Tokens split by the loads of the step keep GPUs busy", "mean GPU load / busiest, per step")
    axes = made.add_subplot()
    groups = [(case, name, found) for case, placements in results.items() for name, found in placements.items()]
    for at, (_, _, found) in enumerate(groups):
        for bar, (kind, colour) in enumerate(zip(SPLITS[:3], COLOURS, strict=False)):
            place = at + 0.27 * (bar - 1)
            axes.bar(place, found[kind], 0.25, color=colour, label=kind if at == 0 else None)
            axes.text(
                place, found[kind] - 0.004, f"{found[kind]:.2f}", ha="center", va="top", fontsize=7, color="white"
            )
        best = found["optimum"]
        axes.hlines(best, at - 0.42, at + 0.42, COLOURS[3], lw=1, ls="--", label="optimum" if at == 0 else "")
    axes.set_xticks(range(len(groups)), [f"{case}\n{name}" for case, name, _ in groups], fontsize=8)
    axes.set_ylim(0.6, 1.0)
    axes.legend(loc="upper left", ncols=4, fontsize=8)
    made.savefig(path, dpi=150)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=os.environ.get("EPLB_TRACES"), help="folder of .npz recordings")
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    cases = [drawn(), *(recorded(Path(arguments.traces)) if arguments.traces else ())]
    results = {case.name: {name: judge(case, make) for name, make in PLACEMENTS.items()} for case in cases}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(results))
    picture(results, arguments.output.with_suffix(".png"))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
