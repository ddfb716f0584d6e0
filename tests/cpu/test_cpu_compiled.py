"""The generated code keeps every rounding, its cache is never stale, and Numba is optional."""

from __future__ import annotations

import dataclasses
import gc
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from eplb_triton import POLICIES
from eplb_triton.policy import (
    Counts,
    Donors,
    Exchange,
    Fixup,
    GpuPack,
    GroupPack,
    Paired,
    Peak,
    PeakEstimate,
    Policy,
    Tie,
)
from tests.sizes import chosen

pytest.importorskip("eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError)

import llvmlite.binding  # type: ignore[import-untyped]
import numba

from eplb_triton.cpu import arith, compiled, fields, pipeline
from eplb_triton.cpu.fields import COUNTS_DISPERSION, COUNTS_SIMULATED, fields_of
from eplb_triton.cpu.linking import LeanCompiler

PACKAGE = Path(compiled.__file__).parent

FLAGGED = re.compile(r"\bf(?:add|sub|mul|div|rem|neg|cmp) (?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc)\b")
FUSED_IR = re.compile(r"@llvm\.(?:fma|fmuladd)\b")
INEXACT_ASM = re.compile(
    r"^\s+(?:v?f(?:n?m(?:add|sub)|ml[as])|v?rcp|v?rsqrt|frecp|frsqrt)\w*\s",  # x86 and ARM
    re.MULTILINE,
)


def generated(entry: Any) -> tuple[str, str]:
    """LLVM IR after optimisation and assembly of an entry point; Numba's cache holds neither, so compiled anew."""
    anew = numba.njit(entry.nopython_signatures[0], pipeline_class=LeanCompiler, **compiled.EXACT)(entry.py_func)
    (ir,), (asm,) = anew.inspect_llvm().values(), anew.inspect_asm().values()
    return ir, asm


def assert_exact(entry: Any, *instructions: str) -> None:
    ir, asm = generated(entry)
    assert not FLAGGED.findall(ir)
    assert not FUSED_IR.findall(ir)
    assert "denormal-fp-math" not in ir  # subnormals kept
    assert not INEXACT_ASM.findall(asm)
    for instruction in instructions:
        assert re.search(rf"= {instruction} ", ir), instruction


@pytest.mark.parametrize(
    "policy",
    chosen(
        [
            POLICIES["adaptive_tail_and_fixup"],
            POLICIES["adaptive_tail_and_packer_2x2"],
            POLICIES["hybrid_tail_waterfill"],
            POLICIES["balanced"],
        ],
        POLICIES["hybrid_tail_waterfill"],
        POLICIES["balanced"],
    ),
    ids=lambda policy: policy.name,
)
def test_rows_round_once_an_operation(policy: Policy) -> None:
    """The four have every stage of the others but the tails below."""
    both = r"(?:<\d+ x )?float>?", r"(?:<\d+ x )?double>?"
    assert_exact(pipeline.compiled_rows(fields_of(policy)), *(f"fdiv {type_}" for type_ in both), "fadd double")


@pytest.mark.parametrize("counts", [COUNTS_DISPERSION, COUNTS_SIMULATED])
def test_mean_lengths_round_once_an_operation(counts: int) -> None:
    assert_exact(pipeline.compiled_mean_length(counts), "fdiv double", "fadd double")


def test_the_patterns_find_what_they_look_for() -> None:
    @numba.njit("float64(float64[::1], float64[::1])", fastmath=True)
    def dot(a: Any, b: Any) -> float:
        total = 0.0
        for i in range(a.size):
            total += a[i] * b[i]
        return total

    (ir,), (asm,) = dot.inspect_llvm().values(), dot.inspect_asm().values()
    assert FLAGGED.search(ir)
    if platform.machine() == "aarch64" or llvmlite.binding.get_host_cpu_features().get("fma"):
        assert INEXACT_ASM.search(asm)


def test_one_signature_an_entry_point() -> None:
    """Loads come as float32 whatever they were, so nothing is compiled once a type."""
    entry = pipeline.compiled_mean_length(COUNTS_DISPERSION)
    assert entry(np.ones((2, 3), np.float32), 10) == 1
    with pytest.raises(TypeError, match="No matching definition"):
        entry(np.ones((2, 3)), 10)


def test_all_compiled_code_counts_for_the_digest() -> None:
    """`source_digest` reads the files of one folder: every compiled function must come from there."""
    folders = {
        Path(value.py_func.__code__.co_filename).parent
        for name, module in list(sys.modules.items())
        if name.startswith("eplb_triton.")
        for value in vars(module).values()
        if isinstance(value, numba.core.dispatcher.Dispatcher)
    }
    assert folders == {PACKAGE}
    assert not [folder for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__"]


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


def test_stages_are_compiled_once_and_only_as_parts(tmp_path: Path) -> None:
    """A literal argument, say, would compile one twice; a library of its own would be optimised for itself."""
    program = f"""
import sys
import numba
numba.config.CACHE_DIR = {str(tmp_path)!r}
from eplb_triton import POLICIES
from eplb_triton.cpu.fields import fields_of
from eplb_triton.cpu.linking import Part
from eplb_triton.cpu.pipeline import compiled_rows
compiled_rows(fields_of(POLICIES["balanced"]))
stages = dict(
    (id(value), value)
    for name, module in list(sys.modules.items()) if name.startswith("eplb_triton.cpu.")
    for value in vars(module).values() if isinstance(value, numba.core.dispatcher.Dispatcher) and value.overloads
)
print(len(stages) > 40)
for stage in stages.values():
    if [type(compiled.library) for compiled in stage.overloads.values()] != [Part]:
        print(stage, list(stage.overloads))
"""
    assert run_python(program) == "True\n"


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


def test_python_cannot_call_a_stage() -> None:
    """It has no machine code of its own: a TypeError, not a crash."""
    with pytest.raises(TypeError, match="is not callable"):
        arith.ordered_sum(np.ones(3, np.float32))
    assert compiled.runnable(arith.ordered_sum)(np.ones(3, np.float32)) == 3.0


def test_garbage_is_collected_again_after_a_compilation() -> None:
    def twice(x: int) -> int:
        return 2 * x

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            assert compiled.entry_point(twice, "int64(int64)", "test")(4) == 8
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


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


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_does_not_import_numba() -> None:
    assert run_python("import eplb_triton, sys; print('numba' in sys.modules)") == "False\n"


def test_without_numba_the_error_says_what_to_install() -> None:
    program = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import eplb_triton
try:
    import eplb_triton.cpu
except ImportError as error:
    print(error)
"""
    message = run_python(program)
    assert "pip install 'eplb-triton[cpu]'" in message
    assert "No module named 'numba'" in message


def test_every_choice_of_a_policy_is_compiled_or_refused() -> None:
    """A field or a value that is new in policy.py must come here, too: else it would silently be left out."""
    assert [field.name for field in dataclasses.fields(Policy)] == [
        "name",
        "group_pack",
        "group_refine",
        "counts",
        "fixup",
        "gpu_pack",
        "gpu_refine",
        "replan",  # of cpu/replanning.py, which has a test of its own
    ]
    assert [field.name for field in dataclasses.fields(Paired)] == ["moves", "donors"]
    assert [field.name for field in dataclasses.fields(Exchange)] == [
        "pair_rounds",
        "match_rounds",
        "proposers",
        "double_steps",
        "candidates",
    ]
    assert get_args(GroupPack) == fields.GROUP_PACKS
    assert [field.name for field in dataclasses.fields(Fixup)] == ["moves", "donors", "peak", "tie"]
    assert get_args(Counts) == fields.COUNTS
    assert get_args(Donors) == fields.DONORS
    assert get_args(PeakEstimate) == fields.PEAKS
    assert get_args(Tie) == fields.TIES
    assert get_args(GpuPack) == fields.PACKS

    class Unheard(Peak):
        """A refinement that nothing is compiled for."""

    with pytest.raises(ValueError, match=r"backend='cpu' cannot plan with policy.gpu_refine="):
        fields_of(Policy("new", gpu_refine=Unheard()))
