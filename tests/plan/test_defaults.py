"""Plans and bounds do not depend on PyTorch's defaults: serving frameworks change both while they load a model."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eplb_reference
import eplb_triton
from eplb_triton import POLICIES, Topology, lower_bound, plan
from tests.cases import loads
from tests.comparing import assert_same_maps

SHAPES = {
    "hierarchical": (12, Topology(num_replicas=24, num_gpus=8, num_groups=4, num_nodes=2)),
    "too many partitions": (32, Topology(num_replicas=48, num_gpus=8, num_groups=32, num_nodes=4)),
    "two slots": (12, Topology(num_replicas=18, num_gpus=9)),
    "global": (13, Topology(num_replicas=24, num_gpus=4)),
    "no redundancy": (12, Topology(num_replicas=12, num_gpus=3)),
}
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def maps(weight: torch.Tensor, topology: Topology, policy: str) -> tuple[torch.Tensor, ...]:
    placement = plan(weight, topology, policy=policy, backend="reference")
    placement.validate()
    return placement.phy2log, placement.phyrank, placement.logcnt


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_plans_are_the_same_under_any_default(shape: str, policy: str) -> None:
    experts, topology = SHAPES[shape]
    weight = torch.cat([loads(family, 3, 2, experts) for family in ("continuous", "ties", "zeros")])
    want = maps(weight, topology, policy)
    for default in DTYPES:
        with default_dtype(default):
            got = maps(weight, topology, policy)
        assert_same_maps(got, want, str(default))
    with torch.device("meta"):
        got = maps(weight, topology, policy)
    assert_same_maps(got, want, "meta")


def test_sums_stay_float32_where_float64_would_plan_otherwise() -> None:
    """2**24 + 0.5 is 2**24 in float32 and not in float64: pack loads of another type place the last two otherwise."""
    weight = torch.tensor([[2.0**24, 2.0**24, 1, 1, 0.5, 0.5]])
    topology = Topology(num_replicas=6, num_gpus=2)
    want = maps(weight, topology, "deepseek")
    with default_dtype(torch.float64):
        assert_same_maps(maps(weight, topology, "deepseek"), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_the_same_under_any_default(shape: str) -> None:
    experts, topology = SHAPES[shape]
    weight = loads("continuous", 3, 2, experts)
    want = lower_bound(weight, topology)
    for default in DTYPES:
        with default_dtype(default):
            assert lower_bound(weight, topology).equal(want)
    with torch.device("meta"):
        assert lower_bound(weight, topology).equal(want)


FACTORIES = {
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "tensor",
    "as_tensor",
    "triu_indices",
    "eye",
    "linspace",
    "rand",
}


@pytest.mark.parametrize(
    "path",
    [
        *sorted(Path(eplb_reference.__file__).parent.glob("*.py")),
        *sorted((Path(eplb_triton.__file__).parent / "bound").glob("*.py")),
        *sorted((Path(eplb_triton.__file__).parent / "formats").glob("*.py")),
    ],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_every_new_tensor_names_its_type_and_device(path: Path) -> None:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch" and call.func.attr in FACTORIES:
            named = {keyword.arg for keyword in call.keywords}
            assert {"dtype", "device"} <= named, f"{path.name}:{call.lineno}: torch.{call.func.attr} of defaults"
