"""`Launch` without a GPU: what it compiles, once and for all, and what a call then does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ptx.compiled import compile_kernel
from bench.ptx.machine import FaultError
from bench.ptx.plans import run_plan
from bench.studies.launch_time import NoDriver, no_driver
from eplb_triton import POLICIES, Planner, Policy, Topology, plan
from eplb_triton.kernels import relabelling_launcher
from eplb_triton.kernels.launcher import Launch, Outputs
from eplb_triton.kernels.replanning_launcher import ReplanLaunch, price_bits
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.policy import Fixup
from eplb_triton.testing.families import loads
from tests.bench.ptx.test_compiled_plans import plant as plant  # noqa: PLC0414 - a fixture
from tests.planting import Planter

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

TOPOLOGY = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
LAYERS, EXPERTS = 3, 12


def _maps(width: int) -> Outputs:
    shapes = TOPOLOGY.map_shapes(LAYERS, EXPERTS, log2phy=width)
    maps = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    return Outputs(maps["phy2log"], maps["phyrank"], maps["logcnt"], maps["log2phy"], maps["bad"].int())


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a launch that was made allocates or compiles")


@pytest.mark.parametrize("policy", ["deepseek", "adaptive_tail_and_2x2_fixup"])  # one kernel, and two
def test_a_call_only_launches(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_driver(keep=True) as driver:
        launch = Launch(TOPOLOGY, LAYERS, EXPERTS, POLICIES[policy], log2phy_width=5, device="cpu")
        assert driver.launched == []
        weight, maps = torch.rand(LAYERS, EXPERTS), _maps(5)
        with monkeypatch.context() as patch:
            patch.setattr(triton.compiler, "compile", _refuse)
            patch.setattr(triton.runtime.JITFunction, "run", _refuse)
            for factory in ("empty", "zeros", "full", "tensor"):
                patch.setattr(torch, factory, _refuse)
            launch(weight, maps)
            launch(weight.T.contiguous().T, maps)
    names = ["measure_rows"] * (policy != "deepseek") + ["plan_rows"]
    assert [name for name, _, _ in driver.launched] == 2 * names
    assert {grid for _, grid, _ in driver.launched} == {(LAYERS, 2, 1)}
    first, second = (driver.launched[at][2] for at in (len(names) - 1, -1))
    assert first[1:6] == (EXPERTS, 1, LAYERS * 2, EXPERTS * 5, 5)
    assert second[1:3] == (1, LAYERS)
    assert first[6] is launch.scratch
    assert first[7] is launch.partitions
    assert launch.scratch.dtype == torch.uint8


class _NothingNew(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts no operator of PyTorch runs: none fills a tensor, and none makes one but views."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.is_view:
            return function(*args, **(kwargs or {}))
        raise AssertionError(f"a planner that was made calls {function}")


@contextmanager
def _only_launches(driver: NoDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts nothing is compiled or loaded, and no operator of PyTorch runs."""
    with monkeypatch.context() as patch, _NothingNew():  # type: ignore[no-untyped-call]
        patch.setattr(triton.compiler, "compile", _refuse)
        patch.setattr(triton.runtime.JITFunction, "run", _refuse)
        patch.setattr(driver.utils, "load_binary", _refuse)
        yield


@pytest.mark.parametrize("policy", ["deepseek", "balanced"])
def test_a_planner_that_was_made_only_launches(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first call on: no tensor is made, nothing compiled or loaded."""
    with no_driver(keep=True) as driver:
        planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy=policy, backend="triton", log2phy=5)
        out, weight = planner.empty(), torch.rand(LAYERS, EXPERTS)
        assert driver.launched == []
        with _only_launches(driver, monkeypatch):
            planner(weight, out=out)
    assert [name for name, _, _ in driver.launched] == ["plan_rows", "classify_layers"]
    arguments = driver.launched[1][2]
    assert arguments[0] is out.phy2log
    assert arguments[2] is out.classes


def test_a_plan_relabelled_is_two_launches_and_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    room = torch.zeros(LAYERS, EXPERTS, 8, dtype=torch.int64)
    with no_driver(keep=True) as driver:
        planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="deepseek", backend="triton", log2phy=5)
        live, maps = planner.empty(), _maps(5)
        out = planner.over(phy2log=maps.phy2log, logcnt=maps.logcnt, log2phy=room[..., :5])
        weight = torch.rand(LAYERS, EXPERTS)
        with _only_launches(driver, monkeypatch):
            planner(weight, out=out, previous=live)
    assert [name for name, _, _ in driver.launched] == ["plan_rows", "relabel_layers", "classify_layers"]
    _, grid, arguments = driver.launched[1]
    assert grid == (LAYERS, 1, 1)
    assert arguments[0] is live.phy2log
    assert arguments[1:3] == (EXPERTS * 8, 8)
    for filled, mine in zip(arguments[4], (out.phy2log, out.phyrank, out.logcnt, out.log2phy, out.bad), strict=True):
        assert filled is mine


def test_a_history_is_added_up_by_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_driver(keep=True) as driver:
        planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="deepseek", backend="triton", steps=4)
        out, history = planner.empty(), torch.rand(3, LAYERS, EXPERTS)
        with _only_launches(driver, monkeypatch):
            planner(history, out=out)
            planner(history[0], out=out)
    assert [name for name, _, _ in driver.launched] == ["sum_steps", "plan_rows", "classify_layers"] * 2
    assert driver.launched[0][2][1:5] == (LAYERS * EXPERTS, EXPERTS, 1, 3)
    assert driver.launched[3][2][4] == 1
    assert driver.launched[0][2][5] is driver.launched[1][2][0]  # the sum is what is planned for


def test_nothing_is_compiled_for_a_placement_in_force_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relabelling_launcher, "RelabelLaunch", _refuse)
    with no_driver(keep=True) as driver:
        live = plan(torch.rand(LAYERS, EXPERTS), TOPOLOGY, "deepseek", backend="triton")
        with pytest.raises(AssertionError, match="compiles"):
            plan(torch.rand(LAYERS, EXPERTS), TOPOLOGY, "deepseek", previous=live, backend="triton")
    assert [name for name, _, _ in driver.launched] == ["plan_rows", "classify_layers"]


def test_a_planner_that_replans_only_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a placement in force and without; log2phy is the kernel's, wherever its rows lie."""
    room = torch.zeros(LAYERS, EXPERTS, 8, dtype=torch.int64)
    with no_driver(keep=True) as driver:
        planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="steady", backend="triton", log2phy=5, steps=4)
        live, maps = planner.empty(), _maps(5)
        out = planner.over(phy2log=maps.phy2log, logcnt=maps.logcnt, log2phy=room[..., :5])
        history = torch.rand(LAYERS, EXPERTS, 4).permute(2, 0, 1)
        assert driver.launched == []
        with _only_launches(driver, monkeypatch):
            planner(history, out=live)
            planner(history[1:], out=out, previous=live, price=0.5, moves=7)
    assert [name for name, _, _ in driver.launched] == ["replan_layers", "classify_layers"] * 2
    first, second = driver.launched[0][2], driver.launched[2][2]
    assert first[1:6] == (1, EXPERTS * 4, 4, 4, None)
    assert first[8:10] == (EXPERTS * 5, 5)
    assert second[4] == 3
    assert second[5] is live.phy2log
    assert second[6:10] == (price_bits(0.5), 7, EXPERTS * 8, 8)
    assert second[12].log2phy is out.log2phy
    assert second[12].bad is out.bad


class _Loads:
    """Loads at an address, of which nothing is read."""

    def __init__(self, address: int) -> None:
        self.dtype = torch.float32
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def test_one_variant_whatever_the_loads() -> None:
    kernel = launch_plan(TOPOLOGY, EXPERTS, POLICIES["deepseek"], log2phy_width=5).kernels[0]
    with no_driver():
        launch = Launch(TOPOLOGY, LAYERS, EXPERTS, POLICIES["deepseek"], log2phy_width=5, device="cpu")
        given = dict(zip(kernel.signature, launch._stand_ins(kernel), strict=True))
        hashes = set()
        for address, layer_stride, expert_stride in ((0, 12, 1), (4, 12, 1), (16, 1, 3), (8, 16, 16), (0, 1 << 40, 7)):
            changed = {"loads_ptr": _Loads(address), "layer_stride": layer_stride, "expert_stride": expert_stride}
            strides = {"log2phy_layer_stride": 3 * layer_stride, "log2phy_stride": expert_stride}
            arguments = (given | changed | strides).values()
            built = kernel.function.warmup(*arguments, grid=(1, 1, 1), **kernel.options)
            hashes.add(built.hash)
        assert len(hashes) == 1
        assert {variant.hash for variant in _variants(kernel.function)} >= hashes


def _variants(function: Any) -> list[Any]:
    """Every kernel that this process has compiled of a function."""
    return [built for cache in function.device_caches.values() for built in cache[0].values()]


def test_a_compiler_that_dies_of_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(ValueError, match=r"steady' on a GPU needs triton >= 3\.5, found 3\.4\.0.*backend='cpu'"):
        ReplanLaunch(TOPOLOGY, LAYERS, EXPERTS, POLICIES["steady"], steps=4, device="cuda")


def test_a_bad_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device='cpu' must be a GPU for backend 'triton'"):
        Launch(TOPOLOGY, LAYERS, EXPERTS, POLICIES["deepseek"], device="cpu")


MOVES = Policy("moves", fixup=Fixup(moves=3, donors="top", peak="second", tie="first"))
"""No policy of POLICIES makes two moves in a list that is there already."""


def _moved(specs: Any) -> tuple[Tensor, Tensor]:
    """phy2log and its loads, planned by the compiled kernels in 4 warps, where those of the launcher have one."""
    topology = Topology(num_replicas=24, num_gpus=4)
    launch = specs.launch_plan(topology, 9, MOVES, log2phy_width=16)
    kernels = [compile_kernel(replace(spec, num_warps=4), "sm_90", inlined=True) for spec in launch.kernels]
    weight = loads("ties", 5, 6, 9)
    return run_plan(kernels, launch, topology, weight).maps["phy2log"], weight


def test_moves_in_a_list_do_not_race() -> None:
    from eplb_triton.kernels import specs  # noqa: PLC0415 - as the planted ones

    phy2log, weight = _moved(specs)
    topology = Topology(num_replicas=24, num_gpus=4)
    assert torch.equal(phy2log, plan(weight, topology, MOVES, backend="reference").phy2log)


def test_sees_the_missing_barrier_between_moves(plant: Planter) -> None:
    with pytest.raises(FaultError, match="RaceError"):
        _moved(plant("fixup.py", "                    tl.debug_barrier()  #", "                    #"))
