"""What others differential-test planners with: it draws what fits, and sees what differs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from eplb_triton import Placement, Topology, plan
from eplb_triton.testing import FAMILIES, awkward_cases, first_difference, same_placement, write_reproducer
from eplb_triton.testing.families import Case
from eplb_triton.testing.reproducing import read_reproducer, run_reproducer
from eplb_triton.testing.strategies import cases

TOPOLOGY = Topology(num_replicas=6, num_gpus=3)


def test_awkward_cases_fit_and_repeat() -> None:
    drawn = list(awkward_cases(200, seed=3))
    for case, again in zip(drawn, awkward_cases(200, seed=3), strict=True):
        assert case.loads.equal(again.loads)
        assert case.topology == again.topology
        case.topology.check_experts(case.loads.shape[1])
        assert ((case.loads >= 0) & (case.loads <= 2.0**100)).all()
    assert {case.name.rpartition(" ")[0] for case in drawn} == set(FAMILIES)
    assert {case.topology.hierarchical and case.topology.num_nodes > 1 for case in drawn} == {True, False}
    assert min(case.topology.slots_per_gpu for case in drawn) == 1
    assert min(case.topology.num_gpus for case in drawn) == 1
    with pytest.raises(ValueError, match="count=-1 must be at least 0"):
        next(awkward_cases(-1))


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_strategies_draw_what_can_be_planned(case: Case) -> None:
    plan(case.loads, case.topology, "deepseek", backend="reference").validate()


def placed(*layers: list[int]) -> Placement:
    return Placement.from_phy2log(torch.tensor(layers), 4, TOPOLOGY)


def test_the_same_but_for_numbers() -> None:
    want = placed([0, 1, 2, 0, 3, 1])
    for other in ([1, 0, 2, 0, 3, 1], [3, 1, 0, 2, 0, 1]):
        assert same_placement(placed(other), want)
        assert not same_placement(placed(other), want, exact=True)
    assert same_placement(copy.deepcopy(want), want, exact=True)
    assert not same_placement(placed([0, 0, 1, 2, 3, 1]), want)
    message = first_difference(placed([0, 1, 2, 0, 3, 0]), want)
    assert message == "logcnt[layer 0, expert 0] is 3, not 2; 2 values in 1 of 1 layers differ"
    swapped = first_difference(placed([1, 0, 2, 0, 3, 1]), want, exact=True)
    assert swapped == "phy2log[layer 0, slot 0] is 1, not 0; 2 values in 1 of 1 layers differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_a_failing_case_comes_back_from_its_file(tmp_path: Path, dtype: torch.dtype) -> None:
    loads = torch.tensor([[30, 1, 2, 3]], dtype=dtype)
    wrong = placed([0, 1, 2, 3, 1, 2])
    path = write_reproducer(tmp_path / "case.npz", loads, TOPOLOGY, "deepseek", got=wrong, note="too even")
    case = read_reproducer(path)
    assert case.loads.equal(loads)
    assert (case.topology, case.policy, case.note) == (TOPOLOGY, "deepseek", "too even")
    lines = run_reproducer(path)
    assert lines[0].startswith("recorded: logcnt[layer 0, expert 0] is 1, not 3")
    assert "cpu: the bits of reference" in lines


def test_the_command(tmp_path: Path) -> None:
    path = write_reproducer(tmp_path / "case.npz", torch.ones(1, 4), TOPOLOGY, "deepseek")
    run = [sys.executable, "-m", "eplb_triton.testing"]
    done = subprocess.run([*run, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu: the bits of reference" in done.stdout
    (tmp_path / "no.npz").write_bytes(b"nothing")
    done = subprocess.run([*run, str(tmp_path / "no.npz")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no reproducer" in done.stderr
    assert subprocess.run(run, capture_output=True, check=False).returncode == 2
