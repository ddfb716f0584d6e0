"""One command per policy and shape: what it says of kernels, and of what it cannot say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import triton

from bench import gpu, kernel
from bench.ptx.compiled import TARGETS
from eplb_triton import POLICIES

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

SMALL = ["--layers", "2", "--experts", "24", "--slots", "36", "--gpus", "12", "--nodes", "3", "--groups", "6"]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert kernel.main([*SMALL, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_policy_on_a_shape_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "--policy", "deepseek")
    (row,) = found["kernels"]
    assert 0 < row["registers"] <= 168
    assert row["stack_bytes"] == row["local_bytes"] == row["spill_instructions"] == 0
    assert row["shared_bytes"] >= 0
    assert found["shape"]["num_replicas"] == 36
    assert found["estimated"]["cycles"] > 1000
    assert found["estimated"]["us"] == round(found["estimated"]["cycles"] / 1700, 1)
    if not torch.cuda.is_available():
        assert found["measured"] == {"not": "no GPU that torch can see"}


@pytest.mark.full
def test_the_slowest_row_counts(capsys: pytest.CaptureFixture[str]) -> None:
    one, all_of_them = (_json(capsys, "--policy", "balanced", "--rows", rows)["estimated"] for rows in ("1", "6"))
    assert one["cycles"] <= all_of_them["cycles"]


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("policy", [*POLICIES, kernel.SPLITTING])
def test_every_policy_on_every_target(policy: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "0" if policy == "steady" else "1"
    found = _json(capsys, "--policy", policy, "--target", target, "--rows", rows)
    assert all(row["shared_bytes"] >= 0 for row in found["kernels"])
    if target.startswith("gfx"):
        assert all(row["vector_registers"] > 0 and row["vector_spills"] == 0 for row in found["kernels"])
    else:
        assert all(row["registers"] > 0 and row["spill_instructions"] == 0 for row in found["kernels"])
    assert ("not" in found["estimated"]) == (target.startswith("gfx") or rows == "0" or policy == kernel.SPLITTING)


@pytest.mark.full
def test_replanning_is_estimated_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert _json(capsys, "--policy", "steady")["estimated"]["cycles"] > 1000


@pytest.mark.full
def test_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main([*SMALL, "--policy", "deepseek"]) == 0
    text = capsys.readouterr().out
    assert "deepseek on sm_90" in text
    assert "\nestimated: " in text
    assert "\nmeasured: " in text


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["--slots", "37"], "num_replicas=37 must be a multiple of num_gpus=12"),
        (["--experts", "25"], "25"),
        (["--rows", "7"], "rows=7 must be 0 to 6"),
        (["--target", "sm_1"], "sm_90"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(wrong: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        kernel.main([*SMALL, *wrong])
    assert refused.value.code == 2
    assert why in capsys.readouterr().err


def test_the_table_of_gpu_times_has_a_line_for_an_error() -> None:
    times = {family: gpu.Times(1.0, 2.0, 3.0, 4.0, 5.0)._asdict() for family in gpu.FAMILIES}
    rows: list[dict[str, Any]] = [
        {"case": "a", "policy": "b", "times": times},
        {"case": "a", "policy": "c", "error": "ValueError: no"},
    ]
    lines = gpu.table(rows).splitlines()
    assert lines[0].endswith("| warm floor | cold floor | host |")
    assert lines[2:] == [
        "| a | b | 1.0 | 3.0 | 1.0 | 3.0 | 1.0 | 3.0 | 2.0 | 4.0 | 5.0 |",
        "| a | c | ValueError: no |",
    ]


def test_what_is_compiled_beforehand_is_what_is_timed() -> None:
    compiled = {(job.shape, job.policy) for job in gpu.jobs()}
    assert compiled >= {(shape, policy) for shape in gpu.LARGEST_FIRST for policy in gpu.policies_of(shape)}
    assert all(job.model.experts <= job.model.topology.num_replicas for job in gpu.jobs())
