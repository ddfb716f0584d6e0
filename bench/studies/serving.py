"""What a planner is worth to a deployment: the busiest GPU of the steps that follow its plans, and the slots it writes.

    python -m bench.studies.serving --output PATH [--traces FOLDER] [--planners NAME ...] [--layers all]

Rules: 60 s of balanced work; a layer's step takes as long as its busiest GPU; a written slot is an expert of BF16
DeepSeek-V3 over 900 GB/s. A plan is made `interval` + 1 steps after the last one was deployed, a layer a step. Score =
100 * time of DeepSeek's planner on the sum of the last 1024 steps, every 1024 steps / time. Six layers stand for all:
each comes into force in the middle of the steps in which those that it stands for do, one a step; `--layers all` has
them all. Who replans gets as many steps as the plan is for, but 256 at least, 8 for each of its 32 samples. That was
fixed on seeds 1 to 3, against 128 to 4096 steps (none scores 0.1 more), before any seed that is reported was drawn.
Recorded traffic: windows of 16 steps of 128 tokens, a plan on all steps so far, judged on the next window.

Planners: every policy of ours, plans of two of them renumbered (`NAME+previous`), and every peer that can be loaded.
"""

from __future__ import annotations

import json
import os
import resource
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench.machine import environment
from bench.planners.ours import Skip
from bench.serving_planners import OURS, Row, loaded_peers, planner_of, tried
from bench.serving_report import picture, report
from bench.serving_rules import BASELINE, CASES, Case, draw, price_of, simulate
from bench.serving_traces import TraceJob, judge_trace

INTERVALS = (1024, 256, 64)
LEAST_STEPS = 256
FEW_LAYERS = 6
MOST_PROCESSES = 8  # of 0.5 GB each; 1.1 GB with all layers
AnyJob = TypeVar("AnyJob")


class Job(NamedTuple):
    """A case and seed, and who plans for it how often; layers None: all."""

    case: Case
    seed: int
    planners: Sequence[str]
    intervals: Sequence[int]
    layers: int | None
    steps: int | None

    def __str__(self) -> str:
        return f"{self.case.kind} on {self.case.num_gpus} GPUs, seed {self.seed}"


def judge(job: Job) -> list[Row | Skip]:
    """A row for every planner and interval, the baseline always among them."""
    case = job.case
    loads = _drawn(case.kind, case.num_experts, job.layers or case.num_layers, job.seed)

    def row(name: str, interval: int) -> Row:
        newest = job.steps or max(LEAST_STEPS, interval)
        plan = planner_of(name, case.topology, case.num_experts, price_of(case, interval), newest)
        about = {"planner": name, "interval": interval, "kind": case.kind, "gpus": case.num_gpus, "seed": job.seed}
        return about | simulate(case, loads, plan, interval)

    wanted = [(name, interval) for interval in job.intervals for name in job.planners]
    return [tried(name, str(job), partial(row, name, at)) for name, at in dict.fromkeys([BASELINE, *wanted])]


_drawn = lru_cache(1)(draw)  # jobs that differ in GPUs alone follow each other


def spread(
    work: Callable[[AnyJob], list[Row | Skip]], jobs: Sequence[AnyJob], processes: int
) -> tuple[list[Row], list[Skip]]:
    """What `work` makes of the jobs, in their order, one thread a process; who failed, once."""
    rows: list[Row] = []
    skips: dict[Skip, None] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job, done in zip(jobs, pool.map(work, jobs), strict=True):
            print(f"done: {job}", flush=True)
            rows += [row for row in done if not isinstance(row, Skip)]
            skips |= {skip: None for skip in done if isinstance(skip, Skip)}
    return rows, list(skips)


def compact(body: dict[str, Any]) -> str:
    """JSON in which each row of a table is a line: {"columns": [...], "rows": [[...], ...]}."""

    def lines(value: Any) -> str:
        if not value or not isinstance(value, list) or not isinstance(value[0], dict):
            return json.dumps(value)
        rows = [json.dumps([_rounded(cell) for cell in row.values()]) for row in value]
        return f'{{"columns": {json.dumps(list(value[0]))}, "rows": [\n' + ",\n".join(rows) + "\n]}"

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {lines(value)}" for name, value in body.items()) + "\n}\n"


def _rounded(cell: Any) -> Any:
    return float(f"{cell:.7g}") if isinstance(cell, float) else cell


def _layers(text: str) -> int | None:
    """A number of layers, None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a number of at least 1, or all")
    return int(text)


def main() -> None:
    """Run, and write the three files."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--traces", type=Path, default=os.environ.get("EPLB_TRACES"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[2001, 2002, 2003])
    parser.add_argument("--intervals", type=int, nargs="*", default=INTERVALS, help="steps between plans")
    parser.add_argument("--planners", nargs="*", help="some of them; the baseline always takes part")
    parser.add_argument("--gpus", type=int, nargs="*", help="only cases of so many GPUs")
    parser.add_argument("--layers", type=_layers, default=FEW_LAYERS, help="that are drawn and stand for all, or `all`")
    parser.add_argument("--steps", type=int, help="that a policy is given that replans")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, MOST_PROCESSES))
    arguments = parser.parse_args()
    about = environment("bench.studies.serving")
    found, skips = loaded_peers()
    names = arguments.planners or [*OURS, *found]
    if unknown := set(names) - {*OURS, *found}:
        parser.error(f"--planners {' '.join(sorted(unknown))} must be among {' '.join([*OURS, *found])}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not arguments.gpus or case.num_gpus in arguments.gpus]
    jobs = [
        Job(case, seed, names, arguments.intervals, arguments.layers, arguments.steps)
        for seed in arguments.seeds
        for case in cases
    ]
    paths = sorted(Path(arguments.traces).glob("*.npz")) if arguments.traces else []
    on_traces = [TraceJob(path, mixed, names) for path in paths for mixed in (False, True)]
    traces, failed = spread(judge_trace, on_traces, arguments.processes)
    rows, failed_too = spread(judge, jobs, arguments.processes)
    skips = [*([] if arguments.planners else skips), *failed, *failed_too]
    used = [resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    about["cpu_seconds"] = round(sum(used))
    body = {"environment": about, "rows": rows, "traces": traces, "skipped": [asdict(skip) for skip in skips]}
    arguments.output.with_suffix(".json").write_text(compact(body))
    arguments.output.with_suffix(".md").write_text(report(body))
    picture(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
