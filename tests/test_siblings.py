"""One stage, one name, a file in each tree: reference, compiled CPU and Triton are read side by side."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import eplb_reference
import eplb_triton

ROOTS = {
    "reference": Path(eplb_reference.__file__).parent,
    "cpu": Path(eplb_triton.__file__).parent / "cpu",
    "kernels": Path(eplb_triton.__file__).parent / "kernels",
}
STAGES = (
    "groups_partition",
    "replicate",
    "replicate_capped",
    "replicate_waterfill",
    "fixup",
    "fixup_paired",
    "pack",
    "pack_blocks",
    "refine",
    "refine_exchange",
    "maps",
)


def stage_functions(tree: str, stage: str) -> dict[str, list[str]]:
    """Arguments of every public function of a stage; read from the source, so that no compiler is needed."""
    body = ast.parse((ROOTS[tree] / f"{stage}.py").read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {node.name: [argument.arg for argument in node.args.args] for node in functions}


@pytest.mark.parametrize("tree", ["cpu", "kernels"])
@pytest.mark.parametrize("stage", STAGES)
def test_same_functions(tree: str, stage: str) -> None:
    assert set(stage_functions(tree, stage)) == set(stage_functions("reference", stage))


@pytest.mark.parametrize("tree", ["cpu", "kernels"])
@pytest.mark.parametrize("stage", STAGES)
def test_shared_arguments_in_the_same_order(tree: str, stage: str) -> None:
    """Sizes, pointers and scratch may come in between; what two twins both take comes in one order."""
    reference = stage_functions("reference", stage)
    for name, arguments in stage_functions(tree, stage).items():
        words = [argument.removesuffix("_ptr").lower() for argument in arguments]
        shared = [word for word in words if word in reference[name]]
        assert shared == [word for word in reference[name] if word in words], name
