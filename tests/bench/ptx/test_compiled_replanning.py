"""The replanning kernel as compiled: arithmetic and cost on five targets; its PTX, run on the CPU, plans as recorded.

The shipped form, a function a stage: what the kernel passes to them is run, too.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
import triton

from bench.ptx.compiled import TARGETS, Compiled, compile_kernel
from bench.ptx.contract import broken_rules
from bench.ptx.replans import run_replan
from eplb_triton import Topology
from eplb_triton.kernels.arith import triton_version
from eplb_triton.kernels.replanning_shapes import ReplanPlan, replan_plan
from tests.replanning.cases import STEADY, golden
from tests.sizes import chosen, full_unless

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

SHAPES = {
    "v3-global": (256, Topology(num_replicas=288, num_gpus=32)),
    "v3-hierarchical": (256, Topology(num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)),
    "144 GPUs": (256, Topology(num_replicas=288, num_gpus=144)),
    "one warp": (60, Topology(num_replicas=64, num_gpus=8)),
    "one warp, nodes": (24, Topology(num_replicas=36, num_groups=6, num_nodes=3, num_gpus=12)),
}
"""Experts, and where they go."""
REGISTERS = {1: 240, 8: 176 if triton_version() >= (3, 7) else 200}
"""Most a thread, by warps, where no more than a few programs share a multiprocessor. The products of a step are made
with rows of samples in registers. Code of older Tritons takes more."""


def _compiled(experts: int, topology: Topology, target: str, *, previous: bool) -> tuple[Compiled, ReplanPlan]:
    width, warp = topology.num_replicas - experts + 1, TARGETS[target].warp_size
    plan = replan_plan(topology, experts, STEADY, steps=32, log2phy_width=width, warp=warp)
    return compile_kernel(plan.kernel(previous=previous), target), plan


@pytest.mark.parametrize("target", chosen(TARGETS, "sm_90"))
@pytest.mark.parametrize("shape", [pytest.param(name, marks=full_unless(name == "v3-global")) for name in SHAPES])
def test_contract(shape: str, target: str) -> None:
    kernel, _ = _compiled(*SHAPES[shape], target, previous=True)
    assert broken_rules(kernel, REGISTERS[kernel.num_warps], stages=True) == []


def test_square_roots_are_correctly_rounded() -> None:
    """PTX says so; LLVM's expansion for AMD is the one for correct rounding: seven fused operations a root."""
    kernel, _ = _compiled(*SHAPES["v3-global"], "sm_90", previous=True)
    roots = re.findall(r"\br?sqrt\.\S+", kernel.ptx)
    assert set(roots) == {"sqrt.rn.f64", "rsqrt.approx.ftz.f32"}  # the second only for bounds, which `contract` sees to


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("271", id="v3 global"),
        pytest.param("273", id="v3 hierarchical, nothing in force"),
        pytest.param("272", id="144 GPUs", marks=full_unless(False)),
        pytest.param("274", id="144 GPUs, nothing in force", marks=full_unless(False)),
        pytest.param("m34", id="v3 global, a fresh plan after the moves", marks=full_unless(False)),
        pytest.param("249", id="nodes", marks=full_unless(False)),
    ],
)
def test_plans_as_recorded(name: str) -> None:
    case = next(case for file in ("replan", "replan_edges") for case in golden(file) if case.name == name)
    experts = case.history.shape[2]
    kernel, plan = _compiled(experts, case.topology, "sm_90", previous=case.previous is not None)
    ran = run_replan(
        kernel, plan, case.topology, case.history, previous=case.previous, price=case.price, moves=case.moves
    )
    assert torch.equal(ran.outputs["phy2log"], case.planned)
    assert not ran.outputs["status"].any()


def test_what_a_kernel_is_compiled_for_is_in_its_name() -> None:
    """Triton's caches and the names of a kernel's functions know a shape by its `repr` alone."""
    shape = replan_plan(SHAPES["v3-global"][1], 256, STEADY, steps=32).shape
    assert repr(replace(shape)) == repr(shape)
    changed = [replace(shape, **{field.name: None}) for field in fields(shape)]  # type: ignore[arg-type]
    moved = [replace(shape, at=replace(shape.at, **{field.name: -1})) for field in fields(shape.at)]
    assert len({repr(each) for each in [shape, *changed, *moved]}) == 1 + len(changed) + len(moved)
