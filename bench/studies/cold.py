"""The first call of a fresh process, and the memory it takes: one subprocess a planner and case."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import tables
from bench.cases import CASES, Case, series
from bench.machine import ROOT
from bench.planners.ours import PUBLISHED, Planner, ours
from bench.planners.peers import peers
from eplb_triton import POLICIES

MEASURED = ("v3-hierarchical", "512-to-1024")
_TIMEOUT = 300  # seconds; the slowest peer needs 30 on the larger case


def plan(cases: Sequence[Case], planners: Sequence[Planner]) -> list[tuple[str, str, bool]]:
    """(case, planner, whether Numba's cache is emptied) of the first calls to measure."""
    plans = []
    for case in cases:
        if case.name not in MEASURED:
            continue
        for planner in planners:
            if planner.algorithm in POLICIES and planner.algorithm != PUBLISHED:
                continue
            plans.append((case.name, planner.name, False))
            if planner.name.endswith("@cpu") and case.name == MEASURED[0]:
                plans.append((case.name, planner.name, True))
    return plans


def cold_call(case: str, planner: str, *, empty_cache: bool = False) -> dict[str, Any]:
    """Seconds of the first and second call and MiB they add, in a process that planned nothing before.

    Args:
        case: its name; recorded cases are not measured here.
        planner: its name.
        empty_cache: let Numba find no compiled code, as after an installation.

    Raises:
        RuntimeError: the process failed, or took too long.
    """
    command = [sys.executable, "-m", "bench.studies.cold", case, planner]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if empty_cache:
            environment["NUMBA_CACHE_DIR"] = scratch
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=_TIMEOUT
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError((error.stderr.strip().splitlines() or ["no word"])[-1]) from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"more than {_TIMEOUT} s") from error
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"case": case, "planner": planner, "empty_cache": empty_cache, **figures}


def _peak_mib() -> float:
    """Highest resident memory so far, MiB: since `_forget_peak` on Linux, of the whole process elsewhere."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.partition(":")[::2] for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _forget_peak() -> None:
    """Let the peak start again from what is resident now, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def table(result: dict[str, Any]) -> str:
    """First calls in fresh processes, and their memory."""
    rows = []
    for found in result["cold"]:
        name = f"`{found['planner']}`{', nothing compiled yet' if found['empty_cache'] else ''}"
        seconds = [f"{found[key]:.3g}" for key in ("first_s", "second_s")]
        rows.append([found["case"], name, *seconds, f"{found['added_mib']:.0f}", f"{found['peak_mib']:.0f}"])
    header = ["case", "planner", "first call s", "second call s", "memory added MiB", "peak MiB"]
    note = (
        "One fresh process each. Memory: highest resident set during the two calls (VmHWM, reset before them), above "
        "what was resident before, and in all; it counts code and thread stacks too, not tensors alone."
    )
    return f"{tables.table(header, rows)}\n\n{note}" if rows else ""


@click.command()
@click.argument("case")
@click.argument("planner")
def main(case: str, planner: str) -> None:
    """Plan CASE twice with PLANNER and print what it took, as JSON."""
    (row,) = [row for row in CASES if row.name == case]
    (chosen,) = [found for found in [*ours(), *peers()[0]] if found.name == planner]
    call = chosen.bind(series(row)[0], row.topology)
    _forget_peak()
    before, seconds = _peak_mib(), []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    figures = {"first_s": seconds[0], "second_s": seconds[1]}
    click.echo(json.dumps({**figures, "added_mib": _peak_mib() - before, "peak_mib": _peak_mib()}))


if __name__ == "__main__":
    main()
