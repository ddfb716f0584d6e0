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
        "linking": "stages compiled as parts of their entry point",
        "rows": "the stages of a row, each compiled for the fields of a policy that it branches on",
        "fields": "a policy as the integers that compiled code takes",
        "positions": "packs in position order while items are exchanged; the reference has meetings.py",
        "serve": "splitting and routing: layers to threads",
        "replanning_sums": "exact sums, in any order",
        "replanning_room": "what the search for a move needs, allocated once",
        "replanning_swaps": "swaps, apart for the length of replanning_moves.py",
        "replanning_vectors": "sums and products of samples, as loops that become vector code",
        "swaps": "packs with their loads while items are swapped; the reference computes them anew",
        "tournament": "trees of winners; the reference takes the maximum anew",
    },
    "kernels": {
        "swaps": "what a swap needs to know, apart for the length of refine.py",
        "splitting_levels": "the level of a class, apart for the length of splitting.py",
        "meetings": "what an exchange is worth, apart for the length of refine_exchange.py",
        "fused": "the kernel: calls the stages in order",
        "rows": "the loads of a row, for both kernels",
        "buffers": "memory of a row, and the tuples of pointers that the stages take",
        "shapes": "sizes and policy as the one constant that a kernel is compiled for",
        "sorting": "a sort as a function of its own",
        "launcher": "checks, compiles, allocates, then launches",
        "specs": "which kernels and how much scratch a shape needs",
        "steps": "a launch of its own for the sum of a history; the others have it from PyTorch",
        "measure": "a launch of its own for the means over all rows",
        "positions": "packs in position order while items are exchanged; the reference has meetings.py",
        "counting": "counts by atomics; PyTorch has bincount",
        "serve": "the kernels of a serving step: call the stages in order",
        "serve_launch": "their constants and launches",
        "relabelling_launcher": "checks, compiles, allocates, then launches",
        "replanning_launcher": "checks, compiles, allocates, then launches",
        "replanning_shapes": "sizes, and where each array of a layer begins",
        "replanning_loads": "loads of replicas and GPUs in memory; the others keep them in their states",
        "replanning_slots": "lists of slots by a sort, and the maps",
        "replanning_swaps": "swaps, apart for the length of replanning_moves.py",
        "replanning_bounds": "float32 numbers that no gain is above; the others value every move",
        "replanning_counts": "what one replica more or fewer changes, apart for the length of replanning_replicas.py",
    },
}
"""The reason why the other trees need no such file."""
TOOLS = ("arith", "fixed", "places")
"""In every tree, and no stage: each has the functions that its language lacks."""
PARTS = ("replanning_*", "relabelling")
"""In every tree, but each has steps of its own in them: only what two of them share is compared."""


@cache
def files(tree: str) -> set[str]:
    """Names of the files of a tree that the two others must have."""
    return {path.stem for path in ROOTS[tree].glob("*.py")} - {"__init__", *OWN[tree]}


SHARED = sorted(set.intersection(*map(files, ROOTS)) - set(TOOLS))
STAGES = [file for file in SHARED if not any(fnmatch(file, part) for part in PARTS)]


def stage_functions(tree: str, stage: str) -> dict[str, list[str]]:
    """Arguments of every public function of a stage; read from the source, so that no compiler is needed. What Numba
    compiles of one bears its name after `compiled_`."""
    body = ast.parse((ROOTS[tree] / f"{stage}.py").read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    public = [node for node in functions if not node.name.startswith(("_", "compiled_"))]
    return {node.name: [argument.arg for argument in node.args.args] for node in public}


@pytest.mark.parametrize("tree", ROOTS)
def test_every_stage_has_a_file_in_every_tree(tree: str) -> None:
    missing = sorted(set().union(*map(files, ROOTS)) - files(tree))
    assert not missing, f"{tree} lacks {', '.join(missing)}; what one tree needs for itself stands in OWN with a reason"


def test_every_file_that_a_tree_needs_for_itself_is_there() -> None:
    for tree, files in OWN.items():
        assert [file for file in files if not (ROOTS[tree] / f"{file}.py").is_file()] == [], tree


@pytest.mark.parametrize("tree", ["cpu", "kernels"])
@pytest.mark.parametrize("stage", STAGES)
def test_same_functions(tree: str, stage: str) -> None:
    assert set(stage_functions(tree, stage)) == set(stage_functions("reference", stage))


@pytest.mark.parametrize("tree", ["cpu", "kernels"])
@pytest.mark.parametrize("stage", SHARED)
def test_shared_arguments_in_the_same_order(tree: str, stage: str) -> None:
    """Sizes, pointers and scratch may come in between; what two twins both take comes in one order."""
    reference, twin = stage_functions("reference", stage), stage_functions(tree, stage)
    for name in reference.keys() & twin.keys():
        words = [argument.removesuffix("_ptr").lower() for argument in twin[name]]
        shared = [word for word in words if word in reference[name]]
        assert shared == [word for word in reference[name] if word in words], name
