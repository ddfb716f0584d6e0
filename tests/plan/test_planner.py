"""plan and rebalance_experts: what they take, what they refuse, what they hand back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eplb_triton import EFFORTS, POLICIES, Placement, Policy, Topology, plan, rebalance_experts
from eplb_triton.backends import resolve_backend
from eplb_triton.policy import Corner, Exchange, Fixup, Nearest, Paired, Peak, resolve_policy
from tests.backends import CPU_BACKENDS
from tests.comparing import assert_same

TOPOLOGY = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
WEIGHT = torch.arange(24.0).reshape(2, 12)


def test_plan_returns_a_placement() -> None:
    placement = plan(WEIGHT, TOPOLOGY, policy="hybrid_tail_waterfill", log2phy=True)
    assert isinstance(placement, Placement)
    assert placement.topology is TOPOLOGY
    assert placement.policy == "hybrid_tail_waterfill"
    assert placement.phy2log.shape == (2, 16)
    assert placement.log2phy is not None
    assert placement.log2phy.shape == (2, 12, 5)
    assert placement.logcnt.shape == (2, 12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_int32_maps(backend: str) -> None:
    wide, narrow = (
        plan(WEIGHT, TOPOLOGY, backend=backend, dtype=dtype, log2phy=True) for dtype in (torch.int64, torch.int32)
    )
    narrow.validate()
    for name in ("phy2log", "phyrank", "logcnt", "log2phy"):
        assert getattr(narrow, name).dtype == torch.int32
        assert_same(getattr(narrow, name), getattr(wide, name).to(torch.int32), name)
    assert narrow.fingerprint() == wide.fingerprint()
    assert narrow.gpu_loads(WEIGHT).equal(wide.gpu_loads(WEIGHT))
    assert narrow.duplicates().equal(wide.duplicates())
    assert narrow.moved(wide).slots.tolist() == [0, 0]


def test_auto_takes_the_compiled_backend_where_numba_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert resolve_backend("auto", cpu) == "cpu"
    assert resolve_backend("auto", gpu) == "triton"
    assert resolve_backend("reference", gpu) == "reference"
    monkeypatch.setattr("eplb_triton.backends._imports", lambda package: False)
    assert resolve_backend("auto", cpu) == "reference"
    assert resolve_backend("auto", gpu) == "reference"


def test_a_policy_of_ones_own() -> None:
    mine = Policy("mine", counts="gated", gpu_refine=Corner(steps=3))
    placement = plan(WEIGHT, TOPOLOGY, policy=mine)
    placement.validate()
    assert placement.policy == "mine"
    same_as_deepseek = plan(WEIGHT, TOPOLOGY, policy=Policy("plain"))
    assert same_as_deepseek.fingerprint() == plan(WEIGHT, TOPOLOGY, policy="deepseek").fingerprint()


def test_the_default_is_balanced() -> None:
    placement = plan(WEIGHT, TOPOLOGY)
    assert placement.policy == "balanced"
    assert placement.fingerprint() == plan(WEIGHT, TOPOLOGY, policy=POLICIES["balanced"]).fingerprint()
    assert placement.fingerprint() != plan(WEIGHT, TOPOLOGY, policy="deepseek").fingerprint()


def test_efforts_have_names() -> None:
    assert [resolve_policy(f"balanced_{effort}") for effort in ("low", "high")] == [EFFORTS["low"], EFFORTS["high"]]
    assert resolve_policy("balanced") is EFFORTS["medium"] is POLICIES["balanced"]
    assert plan(WEIGHT, TOPOLOGY, policy="balanced_low").policy == "balanced_low"
    assert not {"balanced_low", "balanced_high"} & set(POLICIES)


def test_rebalance_experts_is_deepseeks_function() -> None:
    phy2log, log2phy, logcnt = rebalance_experts(WEIGHT, 16, 4, 2, 8)
    placement = plan(WEIGHT, TOPOLOGY, policy="deepseek")
    assert_same(phy2log, placement.phy2log, "phy2log")
    assert_same(log2phy, placement.slots_of_experts(), "log2phy")
    assert_same(logcnt, placement.logcnt, "logcnt")
    by_name = rebalance_experts(weight=WEIGHT, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert all(a.equal(b) for a, b in zip(by_name, (phy2log, log2phy, logcnt), strict=True))


def test_no_layers() -> None:
    placement = plan(torch.empty(0, 12), TOPOLOGY, log2phy=True)
    assert placement.phy2log.shape == (0, 16)
    assert placement.log2phy is not None
    assert placement.log2phy.shape == (0, 12, 5)
    assert placement.logcnt.shape == (0, 12)
    placement.validate()


def _with(value: float, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = WEIGHT.to(dtype, copy=True)
    weight[layer, expert] = value
    weight[1, 11] = value  # a later one: the first is named
    return weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(12), r"weight has shape \(12,\), must be 2-D: \[layers, experts\]"),
        (torch.ones(1, 1, 2, 12), r"weight has shape \(1, 1, 2, 12\), must be 2-D"),
        (torch.ones(2, 12, dtype=torch.bool), r"weight has dtype torch.bool, must be real or integer"),
        (torch.ones(2, 12, dtype=torch.complex64), r"weight has dtype torch.complex64, must be real or integer"),
        (torch.ones(2, 0), r"num_experts=0 must be at least 1"),
        (torch.ones(2, 17), r"num_replicas=16 must be at least num_experts=17"),
        (torch.ones(2, 10), r"num_groups=4 must divide num_experts=10"),
        (_with(torch.nan, 1, 3), r"weight\[1, 3\]=nan must be a finite load of at least 0"),
        (_with(torch.inf, 0, 5), r"weight\[0, 5\]=inf must be a finite load"),
        (_with(-1.5, 0, 0), r"weight\[0, 0\]=-1.5 must be a finite load of at least 0"),
        (_with(2.0**100 * 1.0001, 1, 0), r"weight\[1, 0\]=1.2\d*e\+30 must be .* at most 2\*\*100"),
        (_with(1e300, 0, 2, torch.float64), r"weight\[0, 2\]=1e\+300 must be"),
        (_with(-7, 1, 1, torch.int64), r"weight\[1, 1\]=-7 must be a finite load of at least 0"),
    ],
)
def test_refused_weights(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("weight", "loads")):
        plan(weight, TOPOLOGY)
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, 16, 4, 2, 8)


def test_loads_are_judged_after_rounding_to_float32() -> None:
    at_most = 2.0**100
    weight = torch.full((1, 12), at_most, dtype=torch.float64)
    weight[0, 0] = at_most * (1 + 2**-40)  # rounds to 2**100
    weight[0, 1] = -1e-60  # rounds to -0, which counts as 0
    assert plan(weight, TOPOLOGY).fingerprint() == plan(weight.clamp(0, at_most), TOPOLOGY).fingerprint()


@pytest.mark.parametrize("weight", [[[1.0] * 12], None, WEIGHT.numpy()])
def test_weight_must_be_a_tensor(weight: Any) -> None:
    with pytest.raises(TypeError, match=f"loads is a {type(weight).__name__}, must be a torch.Tensor"):
        plan(weight, TOPOLOGY)


def test_unknown_policy_and_backend() -> None:
    names = ", ".join([*POLICIES, "balanced_low", "balanced_high"])
    for call in (lambda: plan(WEIGHT, TOPOLOGY, policy="greedy"), lambda: resolve_policy("greedy")):
        with pytest.raises(ValueError, match=rf"^policy='greedy' is unknown, must be one of {names}$"):
            call()
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown, must be one of auto, triton, cpu, reference"):
        plan(WEIGHT, TOPOLOGY, backend="cuda")


def test_refused_options() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.int16 must be torch.int64 or torch.int32"):
        plan(WEIGHT, TOPOLOGY, dtype=torch.int16)
    with pytest.raises(ValueError, match="check='never' must be 'async' or 'sync'"):
        plan(WEIGHT, TOPOLOGY, check="never")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"out is a tuple, must be a Placement"):
        plan(WEIGHT, TOPOLOGY, backend="reference", out=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("x", counts="long"), "Policy.counts='long' must be one of 'dhondt', 'dispersion'"),  # type: ignore[arg-type]
        (lambda: Policy("x", gpu_pack="tight"), "Policy.gpu_pack='tight' must be one of 'plain', 'spread'"),  # type: ignore[arg-type]
        (lambda: Fixup(0, "top", "second", "first"), "Fixup.moves=0 must be at least 1"),
        (lambda: Fixup(1, "any", "second", "first"), "Fixup.donors='any' must be one of"),  # type: ignore[arg-type]
        (lambda: Fixup(1, "top", "third", "first"), "Fixup.peak='third' must be one of"),  # type: ignore[arg-type]
        (lambda: Fixup(1, "top", "second", "last"), "Fixup.tie='last' must be one of"),  # type: ignore[arg-type]
        (lambda: Nearest(steps=1, lights=3), "Nearest.lights=3 must be one of 1, 2"),
        (lambda: Corner(steps=0), "Corner.steps=0 must be at least 1"),
        (lambda: Policy("x", group_pack="best"), "Policy.group_pack='best' must be one of 'plain', 'partition'"),  # type: ignore[arg-type]
        (
            lambda: Policy("x", fixup=Paired(4, 4)),
            r"Policy.fixup=Paired\(.*\) must be Fixup or None with counts='dhondt'",
        ),
        (
            lambda: Policy("x", counts="capped", fixup=Fixup(1, "top", "second", "first")),
            "must be Paired or None with counts='capped'",
        ),
        (
            lambda: Policy("x", gpu_refine=Exchange(2, 8)),
            "must be Nearest, Corner, Peak or None with gpu_pack='plain'",
        ),
        (
            lambda: Policy("x", gpu_pack="blocks", gpu_refine=Corner(1)),
            "must be Exchange or None with gpu_pack='blocks'",
        ),
        (lambda: Paired(moves=0, donors=4), "Paired.moves=0 must be at least 1"),
        (lambda: Paired(moves=4, donors=0), "Paired.donors=0 must be at least 1"),
        (lambda: Exchange(pair_rounds=-1, match_rounds=8), "Exchange.pair_rounds=-1 must be at least 0"),
        (lambda: Exchange(pair_rounds=2, match_rounds=8, proposers=0), "Exchange.proposers=0 must be at least 1"),
    ],
)
def test_refused_policies(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("x", fixup=3), r"Policy.fixup=3 must be one of Fixup, Paired or None, not int"),  # type: ignore[arg-type]
        (
            lambda: Policy("x", group_refine=Peak()),  # type: ignore[arg-type]
            r"Policy.group_refine=Peak\(\) must be one of Nearest, Corner or None",
        ),
        (lambda: Policy("x", gpu_refine="corner"), "Policy.gpu_refine='corner' must be one of Nearest, Corner, Peak"),  # type: ignore[arg-type]
        (lambda: Policy(3), "Policy.name=3 must be a str, not int"),  # type: ignore[arg-type]
        (lambda: Corner(steps=True), "Corner.steps=True must be an integer of at least 1, not bool"),
        (lambda: Corner(steps=1.0), "Corner.steps=1.0 must be an integer of at least 1, not float"),  # type: ignore[arg-type]
        (lambda: Exchange(2, "8"), "Exchange.match_rounds='8' must be an integer of at least 0, not str"),  # type: ignore[arg-type]
        (lambda: plan(WEIGHT, TOPOLOGY, policy=["balanced"]), "policy is a list, must be a name or a Policy"),  # type: ignore[arg-type]
    ],
)
def test_policies_of_wrong_types(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_counts_of_a_policy_are_python_integers() -> None:
    assert type(Corner(steps=np.int64(2)).steps) is int
    assert Corner(steps=np.int64(2)) == Corner(steps=2)


def test_policies_are_the_published_six_in_order_and_ours() -> None:
    assert list(POLICIES) == [
        "deepseek",
        "adaptive_tail_and_2x2_fixup",
        "adaptive_tail_and_fixup",
        "top2_tail_adaptive_and_second_light_refine",
        "adaptive_tail_and_packer_2x2",
        "hybrid_tail_waterfill",
        "balanced",
        "steady",
    ]
    assert all(name == policy.name for name, policy in POLICIES.items())
