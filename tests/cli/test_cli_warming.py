"""`eplb-triton warm`: what is compiled, where it lies, and what is refused."""

from __future__ import annotations

import sys

import pytest

from eplb_triton.cli.program import run


def test_says_what_was_compiled_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba", exc_type=ImportError)
    assert run(["warm", "--policy", "deepseek"]) == 0
    planning, splitting = capsys.readouterr().out.splitlines()
    assert planning.startswith("cpu: deepseek: ")
    assert " s, cached in " in planning
    assert splitting.startswith("cpu: splitting: ")


def test_nothing_compiled_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eplb_triton.cpu.launcher", None)
    assert run(["warm", "--policy", "deepseek"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("cpu: nothing compiled: ")
    assert "nothing was compiled" in err


def test_half_a_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["warm", "--experts", "256", "--gpus", "32"]) == 2
    assert "--experts, --replicas and --gpus go together" in capsys.readouterr().err
