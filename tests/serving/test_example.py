"""The expert-parallel example: outputs are those of one process; faults are seen, and every rank ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from eplb_triton.serving import MoveError
from examples.expert_parallel import parsed, serve
from tests.serving.ranks import run_ranks


class Ran(NamedTuple):
    """What a rank said, and how it ended."""

    status: int
    lines: list[str]
    error: str


def on_rank(_: int) -> dict[str, Ran]:
    """Every fault in turn, the one that ends the last rank last: the processes are started once."""
    return {fault: ran(fault, 20) for fault in ("none", "perturb", "other-map", "kill")}


def ran(fault: str, steps: int) -> Ran:
    options = parsed(["--steps", str(steps), "--backend", "reference", "--fault", fault])
    lines: list[str] = []
    try:
        return Ran(serve(options, torch.device("cpu"), lines.append), lines, "")
    except MoveError as error:
        return Ran(1, lines, str(error))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_outputs_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(on_rank, ranks, tmp_path, dying=ranks - 1)
    assert found.pop() is None
    for rank, by_fault in enumerate(found):
        check_faults(rank, by_fault, last=ranks - 1)


def check_faults(rank: int, by_fault: dict[str, Ran], last: int) -> None:
    good, perturbed, other, killed = (by_fault[fault] for fault in ("none", "perturb", "other-map", "kill"))
    assert (good.status, other.status) == (0, 0)
    assert "ranks differ in plan; the placement in force is kept" in "\n".join(other.lines)
    assert killed.error.startswith(f"rank {last} did not answer; nothing was written on any rank")
    if rank == 0:
        steps = [line for line in good.lines if line.startswith("step")]
        assert len(steps) == 20
        assert all("output equal to that of one process" in line for line in steps)
        assert sum("moved" in line for line in steps) >= 2  # while layers move, too
        assert good.lines[-1].endswith("the output of 0 steps was wrong")
        assert perturbed.status == 1
        assert "differs in" in "\n".join(perturbed.lines)


@pytest.mark.full
def test_the_command() -> None:
    program = Path(__file__).parents[2] / "examples" / "expert_parallel.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run([*torchrun, "--steps", "12"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("2 ranks, 12 steps, 1 replans; the output of 0 steps was wrong\n")
