"""The compiled kernels, run on the CPU instruction by instruction: the reference's bits, no race, within bounds.

What a GPU test would prove but for the hardware itself, and for missing barriers more: compute-sanitizer's racecheck
does not look at global memory. `make test` runs one of the two shapes of DeepSeek-V3 a policy, in turn, as the contract
compiles them, and 12 GPUs; larger shapes are behind `-m slow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
from _pytest.mark.structures import ParameterSet

from bench.ptx.compiled import compile_kernel, compile_plan
from bench.ptx.machine import FaultError
from bench.ptx.memory import Memory, OutOfBoundsError, RaceError
from bench.ptx.plans import run_plan
from eplb_triton import POLICIES, plan
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.testing.families import loads
from eplb_triton.testing.models import MODELS, ODD, Model
from tests.comparing import assert_same
from tests.planting import Planter
from tests.sizes import full_unless

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

SHAPES = MODELS | {"12 GPUs": ODD["hierarchical"], "48 GPUs of 2 slots": ODD["in rounds"]}
V3 = ("v3-hierarchical", "v3-global")
ODD_GPUS = ("v3-144-gpus", "12 GPUs", "48 GPUs of 2 slots")
"""GPUs that are no power of two, so that rows end inside a tile; the first and the last have two slots."""
LARGE = ("qwen3", "kimi-k2", "512-to-1024", "1024-to-2048")


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planter]:
    yield Planter(tmp_path, monkeypatch)
    Planter.forget()


def _plans() -> Iterator[ParameterSet]:
    for number, policy in enumerate(name for name, policy in POLICIES.items() if policy.replan is None):
        for case in V3:
            yield pytest.param(policy, case, marks=full_unless(case == V3[number % 2]))
        for case in ODD_GPUS:
            yield pytest.param(policy, case, marks=full_unless(policy == "balanced" and case == "12 GPUs"))
        for case in LARGE:
            yield pytest.param(policy, case, marks=pytest.mark.slow)


@pytest.mark.parametrize(("policy", "case"), list(_plans()))
def test_equals_the_reference(policy: str, case: str) -> None:
    shape = SHAPES[case]
    kernels = list(compile_plan(shape, POLICIES[policy], "sm_90", inlined=True))
    launch = launch_plan(shape.topology, shape.experts, POLICIES[policy], log2phy_width=_width(shape))
    for family in ("continuous", "mostly idle"):
        weight = loads(family, 3, 1, shape.experts)
        want = plan(weight, shape.topology, policy=policy, backend="reference", log2phy=True)
        got = run_plan(kernels, launch, shape.topology, weight).maps
        for name in ("phy2log", "phyrank", "logcnt", "log2phy"):
            assert_same(got[name], getattr(want, name), f"{name} of {family}")
        assert (got["bad"] == -1).all()


def _width(shape: Model) -> int:
    return shape.topology.num_replicas - shape.experts + 1


def test_bad_loads_count_as_zero() -> None:
    shape = SHAPES["v3-hierarchical"]
    kernels = list(compile_plan(shape, POLICIES["deepseek"], "sm_90", inlined=True))
    launch = launch_plan(shape.topology, shape.experts, POLICIES["deepseek"], log2phy_width=_width(shape))
    weight = loads("continuous", 0, 1, shape.experts)
    bad = {3: float("nan"), 70: float("inf"), 200: -1.0, 255: 2.0**101}
    for expert, load in bad.items():
        weight[0, expert] = load
    got = run_plan(kernels, launch, shape.topology, weight).maps
    assert set(got["bad"].flatten().tolist()) - {-1} <= set(bad)
    assert 3 in got["bad"]
    weight[0, list(bad)] = 0.0
    want = plan(weight, shape.topology, policy="deepseek", backend="reference")
    assert_same(got["phy2log"], want.phy2log, "phy2log")
    assert_same(got["log2phy"], want.slots_of_experts(), "log2phy")


def _run_planted(specs: Any) -> None:
    shape = SHAPES["v3-hierarchical"]
    launch = specs.launch_plan(shape.topology, shape.experts, POLICIES["deepseek"], log2phy_width=_width(shape))
    kernels = [compile_kernel(spec, "sm_90", inlined=True) for spec in launch.kernels]
    run_plan(kernels, launch, shape.topology, loads("continuous", 3, 1, shape.experts))


def test_sees_missing_barriers(plant: Planter) -> None:
    specs = plant("fused.py", "    tl.debug_barrier()\n", "    pass\n")
    with pytest.raises(FaultError, match=r"RaceError: .*ld\.global"):
        _run_planted(specs)


def test_sees_an_access_out_of_bounds(plant: Planter) -> None:
    specs = plant("groups.py", "tl.load(layer_ptr + ", "tl.load(layer_ptr + 300 + ")
    with pytest.raises(FaultError, match=r"OutOfBoundsError: .*ld\.global"):
        _run_planted(specs)


class TestMemory:
    def test_orders_by_barriers(self) -> None:
        memory = Memory(4096, 64)
        address = memory.own(np.zeros(8, np.int32))
        threads, place = np.array([0]), np.array([address])
        memory.store(threads, place, np.ones((1, 4), np.uint8))
        memory.load(threads, place, 4)
        with pytest.raises(RaceError, match="stored"):
            memory.load(np.array([1]), place, 4)
        memory.warp_barrier(np.array([0]))
        memory.load(np.array([1]), place, 4)
        with pytest.raises(RaceError, match="stored"):
            memory.load(np.array([33]), place, 4)
        memory.barrier()
        memory.load(np.array([33, 1]), place.repeat(2), 4)
        with pytest.raises(RaceError, match="loaded"):
            memory.store(np.array([33]), place, np.ones((1, 4), np.uint8))

    def test_remembers_a_read_of_one_warp_after_that_of_another(self) -> None:
        memory = Memory(4096, 96)
        place = np.array([memory.own(np.zeros(8, np.int32))])
        memory.warp_barrier(np.array([1]))  # the warps have met unequally often
        for reader in (0, 33):
            memory.load(np.array([reader]), place, 4)
        with pytest.raises(RaceError, match="loaded"):
            memory.store(np.array([33]), place, np.ones((1, 4), np.uint8))
        memory.warp_barrier(np.array([0, 1]))
        with pytest.raises(RaceError, match="loaded"):  # each warp is past its own read, not past the other's
            memory.store(np.array([33]), place, np.ones((1, 4), np.uint8))
        memory.barrier()
        memory.store(np.array([33]), place, np.ones((1, 4), np.uint8))

    def test_orders_reads_of_one_warp_by_its_barrier(self) -> None:
        memory = Memory(4096, 64)
        place = np.array([memory.own(np.zeros(8, np.int32))])
        memory.load(np.array([0, 1]), place.repeat(2), 4)
        memory.load(np.array([2]), place, 4)
        with pytest.raises(RaceError, match="loaded"):
            memory.store(np.array([0]), place, np.ones((1, 4), np.uint8))
        memory.warp_barrier(np.array([0]))
        memory.store(np.array([0]), place, np.ones((1, 4), np.uint8))

    def test_one_value_of_many_threads_is_no_race(self) -> None:
        memory = Memory(4096, 32)
        place = np.full(32, memory.own(np.zeros(8, np.int32)))
        memory.store(np.arange(32), place, np.ones((32, 4), np.uint8))
        memory.barrier()
        with pytest.raises(RaceError, match="different values"):
            memory.store(np.arange(32), place, np.arange(128, dtype=np.uint8).reshape(32, 4))

    def test_knows_what_is_owned(self) -> None:
        memory = Memory(4096, 32)
        address = memory.own(np.zeros(8, np.int32))
        for place, message in ((address + 32, "no tensor"), (address - 4, "no tensor"), (address + 2, "bytes at")):
            with pytest.raises(OutOfBoundsError, match=message):
                memory.load(np.array([0]), np.array([place]), 4)
