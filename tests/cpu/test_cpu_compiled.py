"""The generated code keeps every rounding, and Numba is optional."""

from __future__ import annotations

import ast
import dataclasses
import gc
import platform
import re
import sys
from importlib import import_module
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
from tests.processes import run_python
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


def test_all_numbers_of_compiled_code_count_for_the_digest() -> None:
    """A number of another module is in the code as it was when that was compiled."""
    outside = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("eplb_triton.cpu"):
                module = import_module(node.module or "")
                if any(isinstance(getattr(module, name.name, None), (int, float, tuple)) for name in node.names):
                    outside.add(node.module)
    assert outside == {module.__name__ for module in compiled.NUMBERS}


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
