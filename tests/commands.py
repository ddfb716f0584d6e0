"""What the tests of the command line share: loads, a call of a command, and what its output says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eplb_triton import Placement, Topology, plan
from eplb_triton.cli import main
from eplb_triton.synthetic import lognormal_series

SERIES = lognormal_series(4, 5, 16, tokens_per_step=2000, top_k=2, seed=3)  # [T, L, E]
SIZE = ("--replicas", 24, "--gpus", 8)
TOPOLOGY = Topology(num_replicas=24, num_gpus=8)

_NUMBER = re.compile(r"(-?[\d,]+(\.\d+)?|-)$")


class Result(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Result(status, out.getvalue(), err.getvalue())


def launch(*arguments: object, code: str | None = None, **environment: str) -> Result:
    """A command as a process of its own; or the Python `code`, with the arguments."""
    done = subprocess.run(process(*arguments, code=code), capture_output=True, check=False, **options(environment))
    return Result(done.returncode, done.stdout, done.stderr)


def process(*arguments: object, code: str | None = None) -> list[str]:
    """The command line of `launch`."""
    return [sys.executable, *(["-c", code] if code else ["-m", "eplb_triton"]), *map(str, arguments)]


def options(environment: dict[str, str]) -> dict[str, Any]:
    """The settings of `launch` for subprocess."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "reference")])
    return {"text": True, "timeout": 120, "env": {**os.environ, "PYTHONPATH": paths, **environment}}


def plans_of(policy: str, size: int = 1) -> list[Placement]:
    """What a policy plans for `SERIES`, window by window."""
    plans: list[Placement] = []
    for stop in range(size, len(SERIES) + 1, size):
        if policy == "steady":
            plans.append(plan(SERIES[:stop], TOPOLOGY, policy, previous=plans[-1] if plans else None))
        else:
            plans.append(plan(SERIES[stop - size : stop].sum(0), TOPOLOGY, policy))
    return plans


def save_loads(folder: Path) -> Path:
    """`SERIES` in a file."""
    np.savez(folder / "loads.npz", loads=SERIES.numpy())
    return folder / "loads.npz"


def save_plan(folder: Path) -> Path:
    """A plan for `SERIES` in a file."""
    assert run("plan", save_loads(folder), *SIZE, "-o", folder / "plan.json").status == 0
    return folder / "plan.json"


def rows(output: str) -> dict[str, list[str]]:
    """First word -> the numbers of its line, of every line that ends in a number."""
    table = {}
    for line in output.splitlines():
        cells = line.split()
        if cells and _NUMBER.match(cells[-1]):
            table[cells[0]] = [cell for cell in cells if _NUMBER.match(cell)]
    return table


def refused(result: Result, *texts: str, status: int = 2) -> None:
    """The command said why in one line, and nothing else."""
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith("eplb-triton: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err
