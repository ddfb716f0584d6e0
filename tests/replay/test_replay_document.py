"""docs/replay.md: its commands run, and print what stands below them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run
from tests.sizes import full_unless

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "replay.md").read_text()
EXAMPLES = re.findall(r"```sh\n([^\n]*)\n```\n\n```text\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(
    ("command", "printed"),
    [pytest.param(*example, marks=full_unless(example is EXAMPLES[0])) for example in EXAMPLES],
    ids=["replay", "report", "recommend"],
)
def test_commands_print_what_is_shown(
    command: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines may be left out or shortened at their end; those shown come in this order."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "eplb-triton"
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    lines = iter(out.splitlines())
    for shown in filter(None, map(str.rstrip, printed.splitlines())):
        assert any(line.startswith(shown) for line in lines), shown


def test_there_are_three_examples() -> None:
    assert [command.split()[1] for command, _ in EXAMPLES] == ["replay", "replay", "recommend"]


def test_the_python_of_the_document_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    arguments = ("--gpus", 16, "--step-tokens", 128, "--experts", 64, "--policy", "deepseek")
    status, out, err = run("replay", tmp_path / "trace.npz", *arguments)
    assert (status, err) == (0, "")
    assert "100 steps, 26 layers, 64 experts" in out


def test_pictures_are_there_and_small() -> None:
    for name in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (DOCS / name).stat().st_size < 150_000
