"""The planner through the kernels: what reaches them, and what comes back."""

from __future__ import annotations

import pytest
import torch

from eplb_triton import Placement, Planner, Topology, plan
from eplb_triton.kernels.steps import StepsLaunch
from tests.cases import loads
from tests.comparing import assert_same

pytestmark = pytest.mark.other_triton

TOPOLOGY = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
LAYERS, EXPERTS = 3, 12
MAPS = ("phy2log", "phyrank", "logcnt", "log2phy")


def poisoned(placement: Placement) -> Placement:
    """A slot that is not written shows."""
    for name in (*MAPS, "bad"):
        if (tensor := getattr(placement, name)) is not None:
            tensor.fill_(-7)
    return placement


def test_plan_is_the_reference_plan() -> None:
    weight = loads("continuous", 1, LAYERS, EXPERTS)
    got, want = (plan(weight, TOPOLOGY, backend=backend, log2phy=True) for backend in ("triton", "reference"))
    assert got.fingerprint() == want.fingerprint()
    for name in (*MAPS, "bad"):
        assert_same(getattr(got, name), getattr(want, name), name)


def test_bad_loads_count_as_zero_or_raise() -> None:
    weight = loads("continuous", 2, LAYERS, EXPERTS)
    weight[1, 7], weight[1, 9], weight[2, 0] = torch.nan, -1.0, torch.inf
    placement = plan(weight, TOPOLOGY, backend="triton")
    placement.validate()
    assert placement.bad is not None
    assert sorted(placement.bad[1].tolist()) in ([-1, 7], [7, 9])  # 9 is in another group, maybe on another node
    assert 0 in placement.bad[2].tolist()
    cleaned = torch.where((weight >= 0) & (weight <= 2.0**100), weight, 0.0)
    assert placement.fingerprint() == plan(cleaned, TOPOLOGY, backend="reference").fingerprint()
    with pytest.raises(ValueError, match=r"loads\[1, 7\] must be a finite load of at least 0"):
        placement.raise_if_bad()
    with pytest.raises(ValueError, match=r"loads\[1, 7\]=nan must be a finite load of at least 0"):
        plan(weight, TOPOLOGY, backend="triton", check="sync")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_planner_fills_what_it_is_given_and_allocates_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(TOPOLOGY, LAYERS, EXPERTS, backend="triton", dtype=dtype, log2phy=True)
    out = poisoned(planner.empty())
    for seed, family in enumerate(("ties", "continuous")):
        weight = loads(family, seed, LAYERS, EXPERTS)
        with monkeypatch.context() as patch:
            for factory in ("empty", "zeros", "full", "empty_like", "zeros_like", "full_like", "tensor"):
                patch.setattr(torch, factory, _refuse)
            assert planner(weight, out=out) is out
        want = plan(weight, TOPOLOGY, backend="reference", dtype=dtype, log2phy=True)
        for name in (*MAPS, "bad"):
            assert_same(getattr(out, name), getattr(want, name), name)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a planner allocated after it was made")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_steps_are_added_in_float64_oldest_first(dtype: torch.dtype) -> None:
    """Of any strides, of numbers whose order of addition shows."""
    random = torch.Generator().manual_seed(3)
    draw = torch.rand(LAYERS, 300, 40, generator=random, dtype=torch.float64) ** 9 * 2.0**50
    history = draw.permute(2, 0, 1).to(dtype)
    add_steps = StepsLaunch(LAYERS, 300, dtype, torch.device("cpu"))
    for given in (history, history.flip(0), history[3:4]):
        want = torch.zeros(LAYERS, 300, dtype=torch.float64)
        for step in given:
            want += step.float()
        assert torch.equal(add_steps(given), want.float())


def test_a_history_is_its_sum() -> None:
    history = torch.stack([loads("continuous", seed, LAYERS, EXPERTS) for seed in (5, 6, 7)])
    planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="deepseek", backend="triton", steps=3)
    alone = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="deepseek", backend="triton")
    want = plan(history, TOPOLOGY, "deepseek", backend="reference")
    assert planner(history).fingerprint() == want.fingerprint()
    assert planner(history[2]).fingerprint() == planner(history[2:]).fingerprint() == alone(history[2:]).fingerprint()


def test_a_bad_load_of_a_history_takes_the_expert_with_it() -> None:
    history = torch.stack([loads("continuous", seed, LAYERS, EXPERTS) for seed in (5, 6, 7)])
    history[1, 2, 3] = -1e30
    planned = plan(history, TOPOLOGY, backend="triton")
    assert planned.bad is not None
    assert sorted(planned.bad.flatten().tolist()) == [-1] * 5 + [3]
    without = history.clone()
    without[:, 2, 3] = 0.0
    assert planned.fingerprint() == plan(without, TOPOLOGY, "balanced", backend="reference").fingerprint()


def test_over_an_engines_tensors() -> None:
    """log2phy of another width, in rows that lie apart; a width that is too small is told, and the rest is right."""
    weight = torch.ones(LAYERS, EXPERTS)
    weight[1, 4] = 1000.0  # three replicas
    want = plan(weight, TOPOLOGY, "deepseek", backend="reference")
    for width in (9, 2):
        room = torch.full((LAYERS, EXPERTS, 16), -7, dtype=torch.int64)
        planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy="deepseek", backend="triton", log2phy=width)
        maps = {"phy2log": torch.zeros(LAYERS, 16, dtype=torch.int64), "logcnt": torch.zeros_like(room[..., 0])}
        out = planner.over(**maps, log2phy=room[..., :width])
        planner(weight, out=out)
        assert_same(maps["phy2log"], want.phy2log, "phy2log")
        assert_same(room[..., :width], want.slots_of_experts(width), "log2phy")
        assert set(room[..., width:].flatten().tolist()) == {-7}
        assert out.bad is not None
        assert (out.bad == -1).all() == (width >= int(want.logcnt.amax()))
        assert set(out.bad.flatten().tolist()) <= {-1, -2}


def test_refused_out() -> None:
    weight = loads("ties", 4, LAYERS, EXPERTS)
    planner = Planner(TOPOLOGY, LAYERS, EXPERTS, backend="triton")
    with pytest.raises(ValueError, match=r"out.logcnt has shape \(3, 8\), must be \(3, 12\)"):
        planner(weight, out=Placement.empty(TOPOLOGY, 3, 8))
    with pytest.raises(ValueError, match=r"out is torch.int32 on cpu, must be torch.int64 on cpu"):
        planner(weight, out=Placement.empty(TOPOLOGY, 3, 12, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"loads is torch.float64 on cpu, must be torch.float32 on cpu"):
        planner(weight.double())
    with pytest.raises(ValueError, match=r"num_experts=2049 must be at most 2048 for backend 'triton'"):
        plan(torch.ones(1, 2049), Topology(num_replicas=2049, num_gpus=1), backend="triton")
    with pytest.raises(ValueError, match=r"num_experts=2049 must be at most 2048 for backend 'triton'"):
        plan(torch.ones(1, 2049), Topology(num_replicas=2049, num_gpus=1), policy="steady", backend="triton")
