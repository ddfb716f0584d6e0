"""`plan` through the kernels: what reaches them, and what comes back."""

from __future__ import annotations

import pytest
import torch

from eplb_triton import POLICIES, Topology, plan
from eplb_triton.kernels.launcher import Outputs
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.policy import DEFAULT_POLICY
from tests.cases import loads

pytestmark = pytest.mark.other_triton

TOPOLOGY = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
LAYERS, EXPERTS = 3, 12


def outputs(dtype: torch.dtype = torch.int64) -> Outputs:
    """Poisoned, so that a slot that is not written shows."""
    shapes = {"phy2log": (16,), "phyrank": (16,), "logcnt": (12,), "log2phy": (12, 5)}
    maps = {name: torch.full((LAYERS, *shape), -7, dtype=dtype) for name, shape in shapes.items()}
    return Outputs(**maps, bad=torch.full((LAYERS, 2), -7, dtype=torch.int32))


def test_plan_is_the_reference_plan() -> None:
    weight = loads("continuous", 1, LAYERS, EXPERTS)
    got, want = (plan(weight, TOPOLOGY, backend=backend) for backend in ("triton", "reference"))
    assert got.fingerprint() == want.fingerprint()
    assert got.log2phy.equal(want.log2phy)
    assert got.bad is not None
    assert got.bad.tolist() == [[-1, -1]] * LAYERS
    assert want.bad is None


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
    with pytest.raises(ValueError, match=r"weight\[1, 7\]=nan must be a finite load of at least 0"):
        plan(weight, TOPOLOGY, backend="triton", check="sync")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_out_and_workspace_are_filled_in_place(dtype: torch.dtype) -> None:
    weight = loads("ties", 3, LAYERS, EXPERTS)
    shape = launch_plan(TOPOLOGY, EXPERTS, POLICIES[DEFAULT_POLICY], dtype=dtype, want_log2phy=True)
    out, workspace = outputs(dtype), shape.workspace(LAYERS, "cpu")
    got = plan(weight, TOPOLOGY, backend="triton", out=out, workspace=workspace)
    want = plan(weight, TOPOLOGY, backend="reference", dtype=dtype)
    assert got.phy2log is out.phy2log
    assert got.log2phy is out.log2phy
    for name in ("phy2log", "phyrank", "logcnt", "log2phy"):
        assert getattr(out, name).equal(getattr(want, name)), name


def test_refused_out() -> None:
    weight = loads("ties", 4, LAYERS, EXPERTS)
    with pytest.raises(ValueError, match=r"out.logcnt has shape \(3, 11\), must be \(3, 12\)"):
        plan(weight, TOPOLOGY, backend="triton", out=outputs()._replace(logcnt=torch.zeros(3, 11, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"out\.phyrank has dtype torch\.int32, must be torch\.int64"):
        plan(weight, TOPOLOGY, backend="triton", out=outputs()._replace(phyrank=outputs(torch.int32).phyrank))
    with pytest.raises(ValueError, match=r"num_experts=2049 must be at most 2048 for backend 'triton'"):
        plan(torch.ones(1, 2049), Topology(num_replicas=2049, num_gpus=1), backend="triton")
