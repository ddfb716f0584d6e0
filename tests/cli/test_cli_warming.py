"""`eplb-triton warm`: what is compiled, where it lies, and what is refused."""

from __future__ import annotations

import pytest

from eplb_triton.cli.program import run


def test_says_what_was_compiled_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numba", exc_type=ImportError)
    assert run(["warm", "--policy", "deepseek"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cpu: deepseek: ")
    assert " s, cached in " in line


def test_half_a_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["warm", "--experts", "256", "--gpus", "32"]) == 2
    assert "--experts, --replicas and --gpus go together" in capsys.readouterr().err
