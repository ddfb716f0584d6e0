"""What is compiled is kept on disk, never stale, and is said while it happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_python

pytest.importorskip("eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError)

import numba

from eplb_triton.cpu import compiled

PACKAGE = Path(compiled.__file__).parent


CALLEE = """
from twofiles.compiled import stage

@stage
def step(x):
    return x + 1
"""


CALLER = """
import sys
from twofiles.callee import step
from twofiles.compiled import entry_point

def variant(times):
    def total(x):
        for _ in range(times):
            x = step(x)
        return x
    return entry_point(total, "int64(int64)", str(times))

for times in map(int, sys.argv[1:]):
    function = variant(times)
    (hits,) = function.stats.cache_hits.values() or [0]
    print(function(100), "loaded" if hits else "compiled")
"""


def test_a_compilation_is_said_once_and_a_hit_is_not(tmp_path: Path) -> None:
    """Here, where stderr is no terminal, to the log."""
    program = f"""
import logging, sys
import numba
numba.config.CACHE_DIR = {str(tmp_path)!r}
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stdout)
from eplb_triton import POLICIES
from eplb_triton.cpu.fields import fields_of
from eplb_triton.cpu.pipeline import compiled_rows
compiled_rows(fields_of(POLICIES["deepseek"]))
"""
    line = "eplb_triton eplb_triton: compiling policy deepseek, about 4 s of CPU, once for this machine"
    said = run_python(program).splitlines()
    assert len(said) == 1
    assert said[0].startswith(line)
    assert run_python(program) == ""


def test_at_a_terminal_it_is_said_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))  # of its own: what an earlier run left says nothing
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def thrice(x: int) -> int:
        return 3 * x

    assert compiled.entry_point(thrice, "int64(int64)", "said", "a test, about 1 s")(4) == 12
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("eplb_triton: compiling a test, about 1 s of CPU") == 1


class TwoFiles:
    """A package of a cached function and one that it calls in another file, compiled as this package is."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "twofiles"
        self.cache = folder / "cache"
        self.package.mkdir()
        for name in ("compiled.py", "linking.py"):
            text = (PACKAGE / name).read_text().replace("eplb_triton.cpu", "twofiles")
            (self.package / name).write_text(text)
        (self.package / "__init__.py").touch()
        (self.package / "callee.py").write_text(CALLEE)
        (self.package / "caller.py").write_text(CALLER)

    def run(self, *times: int, **environment: str) -> list[str]:
        command = [sys.executable, "-B", "-m", "twofiles.caller", *map(str, times)]
        variables = {"NUMBA_CACHE_DIR": str(self.cache), **environment, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command, cwd=self.package.parent, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def two_files(tmp_path: Path) -> TwoFiles:
    return TwoFiles(tmp_path)


def test_a_second_process_loads_what_the_first_compiled(two_files: TwoFiles) -> None:
    assert two_files.run(1, 3) == ["101 compiled", "103 compiled"]
    assert two_files.run(3, 1) == ["103 loaded", "101 loaded"]
    indices = {path.name for path in two_files.cache.rglob("*.nbi")}
    assert len(indices) == 2  # a file each: two processes storing two variants cannot overwrite one another's


def test_a_change_in_a_called_file_is_seen(two_files: TwoFiles) -> None:
    assert two_files.run(2) == ["102 compiled"]
    (two_files.package / "callee.py").write_text(CALLEE.replace("x + 1", "x + 5"))
    assert two_files.run(2) == ["110 compiled"]
    (two_files.package / "callee.py").write_text(CALLEE)
    assert two_files.run(2) == ["102 loaded"]


def test_compiles_where_nothing_can_be_cached(two_files: TwoFiles) -> None:
    """A read-only install, and no home to write to: files stand where the folders would be."""
    (two_files.package / "__pycache__").write_text("")
    nowhere = two_files.package / "__pycache__" / "home"
    places = {"NUMBA_CACHE_DIR": "", "HOME": str(nowhere), "XDG_CACHE_HOME": str(nowhere)}
    assert two_files.run(2, **places) == ["102 compiled"]


def test_compiles_where_the_cache_is_damaged(two_files: TwoFiles) -> None:
    two_files.run(2)
    for stored in two_files.cache.rglob("*.nbc"):
        stored.write_bytes(b"\x80damaged")
    assert two_files.run(2) == ["102 compiled"]
