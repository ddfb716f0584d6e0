"""Device and host time of a plan on this GPU: every policy and shape, beside an empty kernel on the same grid.

    python -m bench.gpu_timing --compile-only     # in parallel, fills Triton's cache; prints nothing to keep
    python -m bench.gpu_timing --output DIR       # DIR/timing.json and DIR/timing.md

Times are of replays of a CUDA graph of 20 plans in a row, per plan, median of 30; outputs and scratch are preallocated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton

from bench.cases import Case
from bench.gpu_shapes import MODELS, SMALL, V3
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.launcher import Launch, launch
from eplb_triton.testing.families import loads

FAMILIES = ("continuous", "zipf", "zeros")
_PLANS_A_GRAPH = 20
_REPLAYS = 30
_CALLS = 200


@triton.jit  # type: ignore[untyped-decorator]
def empty_kernel() -> None:
    """Nothing: what a launch on a grid costs by itself."""
    return


class Job(NamedTuple):
    """A first plan."""

    case: str
    policy: str
    layers: int
    experts: int
    topology: Topology
    want_log2phy: bool


def jobs() -> list[Job]:
    """Every kernel that the tests and the times need, the largest first."""
    cases = [(case.name, case.layers, case.experts, case.topology, False) for case in reversed(MODELS.values())]
    cases.append((V3.name, V3.layers, V3.experts, V3.topology, True))
    cases += [(name, 3, experts, topology, True) for name, (experts, topology) in SMALL.items()]
    return [Job(name, policy, *rest) for name, *rest in cases for policy in POLICIES]  # type: ignore[arg-type]


def compile_one(job: Job) -> dict[str, Any]:
    """Seconds of the first plan of a shape and policy, all of it but the import: compile, load, launch."""
    weight = loads("continuous", 0, job.layers, job.experts).cuda()
    begin = time.perf_counter()
    launch(weight, job.topology, POLICIES[job.policy], want_log2phy=job.want_log2phy)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return {"case": job.case, "policy": job.policy, "log2phy": job.want_log2phy, "first_plan_s": seconds}


def compile_all(workers: int) -> list[dict[str, Any]]:
    """All jobs, in processes that share the machine: each time is an upper bound."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_one, jobs()))


def measure(case: Case, policy: str) -> dict[str, Any]:
    """One row of the table, times in microseconds."""
    chosen = POLICIES[policy]
    planned = Launch(case.topology, case.layers, case.experts, chosen, device="cuda")
    plan = planned.plan
    out = launch(torch.ones(case.layers, case.experts, device="cuda"), case.topology, chosen)
    row: dict[str, Any] = {"case": case.name, "policy": policy, "grid": plan.grid(case.layers)}
    row["warps"] = [kernel.num_warps for kernel in plan.kernels]
    for family in FAMILIES:
        weight = loads(family, 1, case.layers, case.experts).cuda()
        row[family] = _graph(lambda: planned(weight, out))  # noqa: B023
    row["empty kernel"] = _graph(lambda: empty_kernel[plan.grid(case.layers)](num_warps=plan.kernels[-1].num_warps))
    row["host"] = _host(lambda: planned(weight, out))
    return row


def _graph(call: Callable[[], object]) -> float:
    """Microseconds a call, from replays of a graph of `_PLANS_A_GRAPH` calls."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # capture wants everything compiled
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_PLANS_A_GRAPH):
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _PLANS_A_GRAPH)
    return median(times)


def _host(call: Callable[[], object]) -> float:
    """Microseconds until an eager call returns; the queue never fills."""
    times = []
    for at in range(_CALLS):
        if at % 10 == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    torch.cuda.synchronize()
    return median(times)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; microseconds."""
    columns = [*FAMILIES, "empty kernel", "host"]
    lines = ["| case | policy | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [row["error"]] if "error" in row else [f"{row[column]:.1f}" for column in columns]
        lines.append(f"| {row['case']} | {row['policy']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """What a reader needs to trace a number. Not bench.machine's: that needs more than this machine may have."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _says("git", "rev-parse", "HEAD"),
        "changed files": _says("git", "status", "--porcelain", "--", ":!bench/results"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _says(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for timing.json and timing.md")
    parser.add_argument("--compile-only", action="store_true", help="write compile.json there instead")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was timed", file=sys.stderr)
        return 1
    folder = arguments.output or Path()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.compile_only:
        (folder / "compile.json").write_text(json.dumps(compile_all(arguments.workers), indent=1) + "\n")
        return 0
    rows = []
    for name in MODELS:
        for policy in POLICIES:
            try:
                rows.append(measure(MODELS[name], policy))
            except Exception as error:  # the other rows are still wanted
                rows.append({"case": name, "policy": policy, "error": f"{type(error).__name__}: {error}"[:200]})
            found = {"environment": environment(), "rows": rows}
            (folder / "timing.json").write_text(json.dumps(found, indent=1) + "\n")
            (folder / "timing.md").write_text(table(rows))
    print(table(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
