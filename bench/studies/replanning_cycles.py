"""Estimated cycles of replanning a layer, stage by stage, as `bench.ptx.sass_cycles` does it: an ESTIMATE, no GPU.

    python -m bench.studies.replanning_cycles --output bench/results/replanning-cycles.md

256 experts, 288 slots, 32 GPUs, 32 steps of history. The kernel is run as shipped, a function a stage. In the end, how
layers differ: `--layers` of them, drawn, each of which may write 25 slots.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from bench.ptx.compiled import Compiled, compile_kernel
from bench.ptx.machine import Machine
from bench.ptx.replans import run_replan
from bench.ptx.sass_cycles import GIGAHERTZ, estimate, estimate_loop
from bench.ptx.sass_issue import straight
from bench.ptx.sass_runs import runs_of
from eplb_triton import POLICIES, Planner, Topology
from eplb_triton.kernels.replanning_shapes import ReplanPlan, replan_plan
from eplb_triton.synthetic import lognormal_series, serving_steps

EXPERTS, STEPS = 256, 32
GLOBAL = Topology(num_replicas=288, num_gpus=32)
BY_NODES = Topology(num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)
CASES = {
    "global": (GLOBAL, True, "lognormal"),
    "hierarchical": (BY_NODES, True, "lognormal"),
    "global, first plan": (GLOBAL, False, "lognormal"),
    "global, first plan, bursts of single experts": (GLOBAL, False, "serving"),
}
"""By name: the cluster, whether a plan is in force, and the loads."""
LAYERS, MOVES = 16, 25
"""Drawn layers, and the slots that each may write."""


def by_stage(kernel: Compiled, machine: Machine) -> dict[str, tuple[float, float]]:
    """Of every function of a kernel: how often it ran, and its cycles in all."""
    sass = kernel.sass_listing
    runs = runs_of(sass, machine)
    sharing = -(-kernel.num_warps // 4)
    cycles: dict[str, float] = defaultdict(float)
    for loop in sass.loops:
        if found := estimate_loop(sass, loop, runs, sharing):
            cycles[sass.name_at(loop.head)] += found.cycles
    inside = {at for loop in sass.loops for at in loop.body}
    stages = {}
    for start, stop in pairwise([*sass.entries, len(sass.instructions)]):
        name, calls = sass.name_at(start), runs[start]
        outside = [at for at in range(start, stop) if at not in inside and runs[at] >= max(0.5, 0.5 * calls)]
        code = [sass.instructions[at] for at in outside]
        short = re.search(r"kernels_\$_\w+?_\$_(\w+?)__[TP]", name)
        stages[short.group(1) if short else name[:20] or kernel.name] = (
            calls,
            cycles[name] + calls * max(straight(code), len(code) * sharing),
        )
    return stages


def report(name: str) -> list[str]:
    """Markdown lines of a case."""
    topology, in_force, loads = CASES[name]
    bursts = loads == "serving"
    history = torch.stack(list(serving_steps(2 * STEPS, 1, EXPERTS, seed=1))) if bursts else _lognormal(1)
    live = _in_force(topology, history) if in_force else None
    plan, kernel = _compiled(topology, in_force)
    ran = run_replan(kernel, plan, topology, history[STEPS:].float(), previous=live, price=3e-4, moves=None)
    total = estimate(kernel, ran.machine)
    written = int(ran.outputs["written"][0])
    lines = [
        f"## {name}: {total.cycles:.0f} cycles, {total.cycles / GIGAHERTZ / 1e3:.1f} us",
        "",
        f"{written} slots written; {kernel.num_warps} warps of {total.registers} registers.",
        "",
        "| stage | runs | cycles a run | cycles | share |",
        "|---|---:|---:|---:|---:|",
    ]
    stages = by_stage(kernel, ran.machine)
    for stage, (calls, cycles) in sorted(stages.items(), key=lambda item: -item[1][1]):
        if cycles >= 0.005 * total.cycles:
            share = cycles / total.cycles
            lines.append(f"| {stage} | {calls:.0f} | {cycles / max(calls, 1):.0f} | {cycles:.0f} | {share:.0%} |")
    return [*lines, ""]


def report_layers(num: int) -> list[str]:
    """Markdown lines: every one of `num` drawn layers by itself."""
    history = _lognormal(num)
    live = _in_force(GLOBAL, history)
    plan, kernel = _compiled(GLOBAL, True)
    rows = []
    for layer in range(num):
        loads, previous = history[STEPS:, layer : layer + 1].float(), live[layer : layer + 1]
        ran = run_replan(kernel, plan, GLOBAL, loads, previous=previous, price=3e-4, moves=MOVES)
        rows.append((estimate(kernel, ran.machine).cycles / GIGAHERTZ / 1e3, int(ran.outputs["written"][0])))
    times = [time for time, _ in rows]
    return [
        f"## global, {num} layers that may write {MOVES} slots each: "
        f"{min(times):.1f} to {max(times):.1f} us, {fmean(times):.1f} in the mean",
        "",
        "| us | slots written |",
        "|---:|---:|",
        *(f"| {time:.1f} | {written} |" for time, written in sorted(rows)),
        "",
    ]


def _compiled(topology: Topology, in_force: bool) -> tuple[ReplanPlan, Compiled]:
    plan = replan_plan(topology, EXPERTS, POLICIES["steady"], steps=STEPS)
    return plan, compile_kernel(plan.kernel(previous=in_force), "sm_90")


def _lognormal(layers: int) -> Tensor:
    return lognormal_series(2 * STEPS, layers, EXPERTS, tokens_per_step=3200, sigma=(0.5, 0.9), drift=0.004, seed=1)


def _in_force(topology: Topology, history: Tensor) -> Tensor:
    """What a first plan of the older half of the steps puts into the slots."""
    planner = Planner(topology, history.shape[1], EXPERTS, policy="steady", device="cpu", steps=STEPS)
    return planner(history[:STEPS].float()).phy2log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS, help="drawn ones; 0: none")
    arguments = parser.parse_args()
    lines = [
        "# Cycles of replanning a layer, ESTIMATED from SASS for sm_90; nothing here was measured",
        "",
        "`python -m bench.studies.replanning_cycles --output bench/results/replanning-cycles.md`",
        "",
    ]
    for name in CASES:
        lines += report(name)
    if arguments.layers:
        lines += report_layers(arguments.layers)
    arguments.output.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
