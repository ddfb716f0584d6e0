"""The arithmetic and the cost of the compiled kernels, proved on the assembly, without a GPU.

`make test`: every policy x one of DeepSeek-V3 hierarchical and global, in turn, on sm_90, and `balanced` on gfx942.
`make test-all`: every policy x both on all five targets. `-m slow` adds the large shapes.

A fault planted in a copy of the kernels must be seen: else the rules rule nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
from _pytest.mark.structures import ParameterSet

from bench.cases import CASES
from bench.ptx.compiled import STEPS, TARGETS, compile_kernel, compile_plan
from bench.ptx.contract import broken_rules
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.replanning_shapes import replan_plan
from eplb_triton.kernels.specs import KernelSpec, launch_plan
from tests.planting import Planter
from tests.sizes import full_unless

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

BY_NAME = {case.name: case for case in CASES}
V3 = ("v3-hierarchical", "v3-global")
LARGE = ("v3-144-gpus", "512-to-1024", "1024-to-2048", "kimi-k2")


def _combinations() -> Iterator[ParameterSet]:
    for number, policy in enumerate(name for name, policy in POLICIES.items() if policy.replan is None):
        for target in TARGETS:
            for case in V3:
                few = target == "sm_90" or (target == "gfx942" and policy == "balanced")
                yield pytest.param(policy, case, target, marks=full_unless(few and case == V3[number % 2]))
            for case in LARGE:
                yield pytest.param(policy, case, target, marks=pytest.mark.slow)


@pytest.mark.parametrize(("policy", "case", "target"), list(_combinations()))
def test_contract(policy: str, case: str, target: str) -> None:
    kernels = list(compile_plan(BY_NAME[case], POLICIES[policy], target))
    assert len(kernels) == 1 + (POLICIES[policy].counts in ("dispersion", "simulated"))
    for kernel in kernels:
        assert broken_rules(kernel) == [], kernel.name


def _small_replan() -> KernelSpec:
    topology = Topology(num_replicas=36, num_gpus=12)
    return replan_plan(topology, 24, POLICIES["steady"], steps=STEPS).kernel(previous=True)


def _first_plan() -> KernelSpec:
    case = BY_NAME["v3-hierarchical"]
    return launch_plan(case.topology, case.experts, POLICIES["deepseek"]).kernels[-1]


@pytest.mark.parametrize("spec", [_first_plan, pytest.param(_small_replan, marks=full_unless(False))])
def test_no_check_ends_the_process(spec: Callable[[], KernelSpec]) -> None:
    """TRITON_DEBUG asks for checks of every sum and product of int32; some of ours wrap, and are meant to."""
    ptx = compile_kernel(spec(), "sm_90", debug=True).ptx
    assert "assertfail" not in ptx
    assert "trap;" not in ptx


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planter]:
    yield Planter(tmp_path, monkeypatch)
    Planter.forget()


def _broken(launcher: ModuleType, target: str, policy: str = "deepseek", **options: Any) -> str:
    case = BY_NAME["v3-hierarchical"]
    launch = launcher.launch_plan(case.topology, case.experts, POLICIES[policy], lanes=TARGETS[target].warp_size)
    return "\n".join(broken_rules(compile_kernel(launch.kernels[-1], target, **options)))


@pytest.mark.parametrize(
    ("target", "division"),
    [
        ("sm_90", "x / y"),  # on AMD this is the IEEE division
        ("gfx942", "tl.extra.hip.libdevice.fast_dividef(x, y)"),
    ],
)
def test_sees_an_approximate_division(plant: Planter, target: str, division: str) -> None:
    launcher = plant("arith.py", "tl.math.div_rn(x, y)", division)
    assert "approximate" in _broken(launcher, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_sees_an_approximate_root(plant: Planter, target: str) -> None:
    launcher = plant("arith.py", "tl.math.div_rn(x, y)", "x * tl.rsqrt(y)")
    assert "approximate" in _broken(launcher, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_sees_contraction(plant: Planter, target: str) -> None:
    launcher = plant("swaps.py", "difference - (moved_load + moved_load)", "difference - 2.0 * moved_load")
    found = _broken(launcher, target, "adaptive_tail_and_2x2_fixup", enable_fp_fusion=True)
    assert ("contracted" in found) if target == "sm_90" else ("fused" in found)


def test_sees_a_barrier_in_a_serial_step(plant: Planter) -> None:
    step = "        _, found = largest(key, numbered)\n"
    launcher = plant("replicate.py", step, "        tl.debug_barrier()\n" + step)
    assert "barrier inside a serial loop" in _broken(launcher, "sm_90")


def test_sees_a_step_without_warp_reduction(plant: Planter) -> None:
    launcher = plant("replicate.py", "_, found = largest(key, numbered)", "found = tl.argmax(key, 0) << 16")
    assert "no redux.sync in a loop of _pick_one_by_one" in _broken(launcher, "sm_90")


def test_sees_spills() -> None:
    case = BY_NAME["v3-hierarchical"]
    spec = launch_plan(case.topology, case.experts, POLICIES["deepseek"]).kernels[-1]
    found = "\n".join(broken_rules(compile_kernel(spec, "sm_90", maxnreg=24)))
    assert "STACK" in found
    assert "spilled" in found
