"""The timer of a GPU: a plan replayed from a CUDA graph, with warm and cold caches, beside an empty kernel on its grid.

    python -m bench.gpu --compile-only --output DIR   # in parallel, fills Triton's cache; DIR/compile.json
    python -m bench.gpu --output DIR                  # DIR/timing.json and DIR/timing.md
    compute-sanitizer python -m bench.gpu --once      # a plan of every policy, for a tool that watches the device

Microseconds a call, medians. Warm: a graph of 20 calls in a row, 30 replays. Cold: a graph of one call, each of 30
replays after the L2 cache was overwritten. The floor of each is the same with a kernel that does nothing: what a launch
costs by itself. Host: until an eager call returns. Outputs and scratch are there beforehand.
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
from torch import Tensor

from eplb_triton import POLICIES
from eplb_triton.kernels.launcher import Launch, Outputs
from eplb_triton.kernels.replanning_launcher import ReplanLaunch
from eplb_triton.policy import Policy
from eplb_triton.replans import DEFAULT_PRICE
from eplb_triton.synthetic import awkward_loads
from eplb_triton.testing.models import MODELS, ODD, Model

FAMILIES = ("continuous", "zipf", "zeros")
STEPS = 32
"""Of the history of a policy that replans."""
REPLANNED = ("v3-hierarchical", "v3-global")
"""Shapes on which a policy that replans is compiled and timed, too: its kernel takes the longest to compile."""
LARGEST_FIRST = ("1024-to-2048", "512-to-1024", "qwen3", "kimi-k2", "v3-global", "v3-hierarchical")
CALLS_A_GRAPH = 20
_REPLAYS = 30
_EAGER_CALLS = 200
_OVER_L2 = 256 << 20
"""Bytes: twice the largest L2 cache there is, and more."""


@triton.jit  # type: ignore[untyped-decorator]
def empty_kernel() -> None:
    """Nothing: what a launch on a grid costs by itself."""
    return


class Times(NamedTuple):
    """Microseconds a call."""

    warm: float
    warm_floor: float
    cold: float
    cold_floor: float
    host: float


class Bound(NamedTuple):
    """A policy bound to a shape: `call(loads)` fills tensors that are there; grid and warps of its last kernel."""

    call: Callable[[Tensor], None]
    loads: Callable[[str], Tensor]
    grid: tuple[int, int]
    num_warps: int


def bind(model: Model, policy: Policy, *, log2phy: bool = False) -> Bound:
    """A policy on this GPU, compiled and allocated; one that replans does so from a plan that is in force."""
    layers, experts, topology = model
    width = topology.num_replicas - experts + 1 if log2phy else None
    if policy.replan:
        launch = ReplanLaunch(topology, layers, experts, policy, steps=STEPS, log2phy_width=width, device="cuda")
        live, out = launch.empty(), launch.empty()

        def history(family: str) -> Tensor:
            return awkward_loads(family, 1, STEPS * layers, experts).view(STEPS, layers, experts).cuda()

        def replan(loads: Tensor) -> None:
            launch(loads, out=out, previous=live.phy2log, price=DEFAULT_PRICE)

        launch(history("continuous"), out=live, previous=None, price=0.0)
        return Bound(replan, history, (layers, 1), int(launch.plan.options["num_warps"]))
    shapes = topology.map_shapes(layers, experts, log2phy=log2phy)
    planned = Launch(topology, layers, experts, policy, log2phy_width=width, device="cuda")
    maps = {name: torch.empty(shape, dtype=torch.int64, device="cuda") for name, shape in shapes.items()}
    filled = Outputs(maps["phy2log"], maps["phyrank"], maps["logcnt"], maps.get("log2phy"), maps["bad"].int())

    def draw(family: str) -> Tensor:
        return awkward_loads(family, 1, layers, experts).cuda()

    return Bound(
        lambda loads: planned(loads, filled), draw, planned.plan.grid(layers), planned.plan.kernels[-1].num_warps
    )


def times_of(bound: Bound, loads: Tensor) -> Times:
    """The five figures of a call on `loads`."""

    def call() -> None:
        bound.call(loads)

    def nothing() -> None:
        empty_kernel[bound.grid](num_warps=bound.num_warps)

    warm, warm_floor, cold, cold_floor = (replay(what, cold=it) for it in (False, True) for what in (call, nothing))
    return Times(warm, warm_floor, cold, cold_floor, host(call))


def replay(call: Callable[[], None], *, cold: bool) -> float:
    """Microseconds a call in replays of a graph of it."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # capture wants everything compiled
        call()
    torch.cuda.current_stream().wait_stream(aside)
    calls = 1 if cold else CALLS_A_GRAPH
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    other = torch.empty(_OVER_L2 if cold else 0, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for number in range(_REPLAYS):
        other.fill_(number)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return median(times)


def host(call: Callable[[], None]) -> float:
    """Microseconds until an eager call returns; the queue never fills."""
    times = []
    for at in range(_EAGER_CALLS):
        if at % 10 == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    torch.cuda.synchronize()
    return median(times)


class Job(NamedTuple):
    """A first plan."""

    shape: str
    policy: str
    log2phy: bool

    @property
    def model(self) -> Model:
        return MODELS[self.shape] if self.shape in MODELS else ODD[self.shape]


def jobs() -> list[Job]:
    """Every kernel that the tests and the times need, the largest first."""
    shapes = [(name, False) for name in LARGEST_FIRST] + [(name, True) for name in ("v3-hierarchical", *ODD)]
    return [Job(name, policy, log2phy) for name, log2phy in shapes for policy in policies_of(name)]


def policies_of(shape: str) -> list[str]:
    """The policies that are timed on a shape."""
    return [name for name, policy in POLICIES.items() if policy.replan is None or shape in REPLANNED]


def compile_one(job: Job) -> dict[str, Any]:
    """Seconds of the first plan of a shape and policy, all of it but the import: compile, load, launch."""
    begin = time.perf_counter()
    bound = bind(job.model, POLICIES[job.policy], log2phy=job.log2phy)
    bound.call(bound.loads("continuous"))
    torch.cuda.synchronize()
    return {**job._asdict(), "first_plan_s": time.perf_counter() - begin}


def measure(shape: str, policy: str) -> dict[str, Any]:
    """A row of the table; an error in place of times where there is one: the other rows are still wanted."""
    row: dict[str, Any] = {"case": shape, "policy": policy}
    try:
        bound = bind(MODELS[shape], POLICIES[policy])
        times = {family: times_of(bound, bound.loads(family))._asdict() for family in FAMILIES}
        return {**row, "grid": bound.grid, "warps": bound.num_warps, "times": times}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"[:200]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; microseconds. Floors and host time: those of the first family."""
    both = [(family, cache) for family in FAMILIES for cache in ("warm", "cold")]
    floors = ("warm_floor", "cold_floor", "host")
    columns = [*(", ".join(of) for of in both), *(name.replace("_", " ") for name in floors)]
    lines = ["| case | policy | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [row["error"]] if "error" in row else []
        if "times" in row:
            found = [row["times"][family][cache] for family, cache in both]
            found += [row["times"][FAMILIES[0]][name] for name in floors]
            cells = [f"{value:.1f}" for value in found]
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


def once() -> None:
    """A plan of every policy, of two layers: a watched program is slow."""
    for shape, log2phy in (("v3-hierarchical", True), ("v3-global", False)):
        for policy in POLICIES.values():
            bound = bind(MODELS[shape]._replace(layers=2), policy, log2phy=log2phy)
            bound.call(bound.loads("continuous"))
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of what is written")
    parser.add_argument("--compile-only", action="store_true", help="write compile.json there, and time nothing")
    parser.add_argument("--once", action="store_true", help="plan once by every policy, and write nothing")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile: their times are upper bounds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was timed", file=sys.stderr)
        return 1
    if arguments.once:
        once()
        return 0
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.compile_only:
        with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            compiled = list(pool.map(compile_one, jobs()))
        (folder / "compile.json").write_text(json.dumps(compiled, indent=1) + "\n")
        return 0
    rows: list[dict[str, Any]] = []
    for shape in reversed(LARGEST_FIRST):
        for policy in policies_of(shape):
            rows.append(measure(shape, policy))
            found = {"environment": environment(), "rows": rows}
            (folder / "timing.json").write_text(json.dumps(found, indent=1) + "\n")
            (folder / "timing.md").write_text(table(rows))
    print(table(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
