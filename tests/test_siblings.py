"""One stage, one name, a file in each tree: reference, compiled CPU and Triton are read side by side.

The lists are read from the folders: a file that is put into one tree is asked for in the other two, unless it is named
below as what that tree needs for itself.
"""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

import eplb_reference
import eplb_triton

ROOTS = {
    "reference": Path(eplb_reference.__file__).parent,
    "cpu": Path(eplb_triton.__file__).parent / "cpu",
    "kernels": Path(eplb_triton.__file__).parent / "kernels",
}
OWN = {
    "reference": {
        "pipeline": "calls the stages in order: kernels/fused.py does",
        "meetings": "all rows' packs as tensors while items are exchanged; the others keep positions.py",
    },
    "cpu": {
        "pipeline": "calls the stages in order: kernels/fused.py does",
        "launcher": "layers to threads",
        "compiled": "what Numba may do, and its cache",
        "fields": "a policy as the integers that compiled code takes",
        "positions": "packs in position order while items are exchanged; the reference has meetings.py",
        "swaps": "packs with their loads while items are swapped; the reference computes them anew",
        "tournament": "trees of winners; the reference takes the maximum anew",
    },
    "kernels": {
        "fused": "the kernel: calls the stages in order",
        "rows": "the loads of a row, for both kernels",
        "buffers": "memory of a row, and the tuples of pointers that the stages take",
        "shapes": "sizes and policy as the one constant that a kernel is compiled for",
        "sorting": "a sort as a function of its own",
        "launcher": "checks, compiles, allocates, then launches",
        "specs": "which kernels and how much scratch a shape needs",
        "measure": "a launch of its own for the means over all rows",
        "positions": "packs in position order while items are exchanged; the reference has meetings.py",
    },
}
PARTS = {"replanning_*": "parts of replanning.py, which each tree cuts as its data lie"}
TOOLS = ("arith", "fixed")
"""In every tree, and no stage: each has the functions that its language lacks."""


def _named_for_itself(tree: str, file: str) -> bool:
    return file in OWN[tree] or any(fnmatch(file, pattern) for pattern in PARTS)


@cache
def stages(tree: str) -> set[str]:
    """Names of the files of a tree that the two others must have."""
    files = {path.stem for path in ROOTS[tree].glob("*.py")} - {"__init__"}
    return {file for file in files if not _named_for_itself(tree, file)}


STAGES = sorted(set.intersection(*map(stages, ROOTS)) - set(TOOLS))
PAIRS = [(stage, tree) for stage in STAGES for tree in ("cpu", "kernels")]


def stage_functions(tree: str, stage: str) -> dict[str, list[str]]:
    """Arguments of every public function of a stage; read from the source, so that no compiler is needed."""
    body = ast.parse((ROOTS[tree] / f"{stage}.py").read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {node.name: [argument.arg for argument in node.args.args] for node in functions}


@pytest.mark.parametrize("tree", ROOTS)
def test_every_stage_has_a_file_in_every_tree(tree: str) -> None:
    missing = {stage: other for other in ROOTS for stage in stages(other) - stages(tree)}
    assert not missing, f"{tree} lacks them; a file that one tree needs for itself is named in OWN, with the reason"


def test_every_file_that_a_tree_needs_for_itself_is_there() -> None:
    for tree, files in OWN.items():
        assert [file for file in files if not (ROOTS[tree] / f"{file}.py").is_file()] == [], tree


@pytest.mark.parametrize(("stage", "tree"), PAIRS)
def test_same_functions(stage: str, tree: str) -> None:
    assert set(stage_functions(tree, stage)) == set(stage_functions("reference", stage))


@pytest.mark.parametrize(("stage", "tree"), PAIRS)
def test_shared_arguments_in_the_same_order(stage: str, tree: str) -> None:
    """Sizes, pointers and scratch may come in between; what two twins both take comes in one order."""
    reference = stage_functions("reference", stage)
    for name, arguments in stage_functions(tree, stage).items():
        words = [argument.removesuffix("_ptr").lower() for argument in arguments]
        shared = [word for word in words if word in reference[name]]
        assert shared == [word for word in reference[name] if word in words], name
