"""A planner made once, and placements as buffers: nothing is shared, nothing is stale, nothing lies."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from eplb_triton import POLICIES, Placement, Planner, Topology, plan
from tests.backends import CPU_BACKENDS
from tests.cases import loads
from tests.comparing import assert_same

TOPOLOGY = Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2)
LAYERS, EXPERTS = 5, 64
MAPS = ("phy2log", "phyrank", "logcnt", "log2phy", "bad")


def new_planner(backend: str, policy: str = "balanced", **options: Any) -> Planner:
    return Planner(TOPOLOGY, LAYERS, EXPERTS, policy=policy, backend=backend, **options)


def assert_same_placement(got: Placement, want: Placement) -> None:
    for name in MAPS:
        mine, its = getattr(got, name), getattr(want, name)
        assert (mine is None) == (its is None), name
        if mine is not None:
            assert_same(mine, its, name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_plans_again_and_again(backend: str, policy: str) -> None:
    planner = new_planner(backend, policy, log2phy=True)
    out = planner.empty()
    for seed, family in enumerate(("continuous", "ties", "zeros")):
        weight = loads(family, seed, LAYERS, EXPERTS)
        assert planner(weight, out=out) is out
        assert out.policy == policy
        assert_same_placement(out, plan(weight, TOPOLOGY, policy, backend=backend, log2phy=True))
        out.validate()


def test_allocates_nothing_after_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = new_planner("cpu", log2phy=True)
    out, weight = planner.empty(), loads("continuous", 8, LAYERS, EXPERTS)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a planner allocated a tensor after it was made")

    with monkeypatch.context() as patch:
        for factory in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "full_like"):
            patch.setattr(torch, factory, refuse)
        planner(weight, out=out)
        planner(weight, out=out)
    assert_same_placement(out, plan(weight, TOPOLOGY, backend="reference", log2phy=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_refilled_placement_tells_the_truth(backend: str) -> None:
    """What is asked of a placement follows what it holds now; two placements share nothing."""
    planner = new_planner(backend, log2phy=True)
    before, after = (loads("continuous", seed, LAYERS, EXPERTS) for seed in (1, 2))
    live, ahead = planner.empty(), planner.empty()
    planner(before, out=live)
    planner(before, out=ahead)
    assert ahead.moved(live).slots.sum() == 0
    first = copy.deepcopy(live)
    planner(after, out=ahead)
    assert_same_placement(live, first)
    anew = plan(after, TOPOLOGY, backend=backend, log2phy=True)
    assert_same_placement(ahead, anew)
    assert ahead.moved(live).slots.equal((anew.phy2log != first.phy2log).sum(1))
    assert ahead.moved(live).slots.sum() > 0
    assert_same(ahead.gpu_loads(after), anew.gpu_loads(after), "GPU loads")
    live.copy_(ahead)
    assert_same_placement(live, ahead)
    assert live.fingerprint() == anew.fingerprint()
    ahead.phy2log.fill_(0)
    assert_same_placement(live, anew)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_over_an_engines_tensors(backend: str, dtype: torch.dtype) -> None:
    weight = loads("continuous", 3, LAYERS, EXPERTS)
    planner = new_planner(backend, "deepseek", dtype=dtype, log2phy=9)
    room = torch.full((LAYERS, EXPERTS, 12), -7, dtype=dtype)
    phy2log, logcnt = torch.zeros(LAYERS, 80, dtype=dtype), torch.zeros(LAYERS, EXPERTS, dtype=dtype)
    out = planner.over(phy2log=phy2log, logcnt=logcnt, log2phy=room[..., :9])
    planner(weight, out=out)
    want = plan(weight, TOPOLOGY, "deepseek", backend="reference", dtype=dtype)
    assert_same(phy2log, want.phy2log, "phy2log")
    assert_same(logcnt, want.logcnt, "logcnt")
    assert_same(out.phyrank, want.phyrank, "phyrank")
    assert_same(room[..., :9], want.slots_of_experts(9), "log2phy")
    assert set(room[..., 9:].flatten().tolist()) == {-7}
    out.raise_if_bad()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_count_beyond_the_width_is_a_status(backend: str) -> None:
    weight = torch.ones(LAYERS, EXPERTS)
    weight[3, 40] = 1000.0
    out = new_planner(backend, "deepseek", log2phy=2)(weight)
    assert out.bad is not None
    assert out.bad.amin(1).tolist() == [-1, -1, -1, -2, -1]
    assert out.log2phy is not None
    assert_same(out.log2phy, out.slots_of_experts(2), "log2phy")
    with pytest.raises(ValueError, match="log2phy has room for 2 replicas of an expert, must have for 9"):
        out.raise_if_bad()


def test_refresh_follows_an_engines_slot_map() -> None:
    new = plan(loads("continuous", 4, LAYERS, EXPERTS), TOPOLOGY, backend="reference")
    phy2log, logcnt = new.phy2log.clone(), torch.zeros_like(new.logcnt)
    seen = Placement.over(TOPOLOGY, phy2log=phy2log, logcnt=logcnt, log2phy=torch.zeros(LAYERS, EXPERTS, 17).long())
    seen.refresh()
    seen.validate()
    assert_same(logcnt, new.logcnt, "logcnt")
    phy2log.copy_(Placement.spread_in_order(LAYERS, EXPERTS, TOPOLOGY).phy2log)
    seen.refresh()
    assert_same_placement(seen, Placement.from_phy2log(phy2log, EXPERTS, TOPOLOGY, log2phy=17))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_refused_plan_changes_nothing(backend: str) -> None:
    planner = new_planner(backend, log2phy=True)
    out = planner(loads("continuous", 5, LAYERS, EXPERTS))
    kept = copy.deepcopy(out)
    bad = loads("continuous", 6, LAYERS, EXPERTS)
    bad[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"loads\[2, 3\]=nan must be a finite load of at least 0"):
        planner(bad, out=out)
    assert_same_placement(out, kept)


def test_any_number_of_threads_at_once() -> None:
    planner = new_planner("cpu")
    weights = [loads("continuous", seed, LAYERS, EXPERTS) for seed in range(4)]
    want = [plan(weight, TOPOLOGY, backend="reference") for weight in weights]
    wrong: list[int] = []

    def work(nth: int) -> None:
        out = planner.empty()
        for _ in range(30):
            planner(weights[nth], out=out)
            if out.fingerprint() != want[nth].fingerprint():
                wrong.append(nth)

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ALIGNED = torch.zeros(LAYERS, 80, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phy2log": torch.zeros(LAYERS, 79).long()}, r"phy2log has shape \(5, 79\), must be \(5, 80\)"),
        ({"phy2log": ALIGNED.float()}, "phy2log has dtype torch.float32, must be torch.int64 or torch.int32"),
        ({"logcnt": torch.zeros(LAYERS, EXPERTS).int()}, "logcnt is torch.int32 on cpu, must be torch.int64 on cpu"),
        ({"logcnt": torch.zeros(EXPERTS).long()}, r"logcnt has shape \(64,\), must be 2-D: \[layers, experts\]"),
        ({"phyrank": torch.zeros(80, LAYERS).long().T}, r"phyrank has strides \(1, 5\), must be contiguous"),
        ({"phy2log": torch.zeros(LAYERS * 80 + 1).long()[1:].view(LAYERS, 80)}, "phy2log begins at address 0x"),
        ({"log2phy": torch.zeros(LAYERS, EXPERTS).long()}, r"log2phy has shape \(5, 64\), must be 3-D"),
        (
            {"log2phy": torch.zeros(LAYERS, 9, EXPERTS).long().transpose(1, 2)},
            "must have entries of an expert side by side",
        ),
    ],
)
def test_tensors_that_no_planner_can_fill(change: dict[str, torch.Tensor], message: str) -> None:
    good: dict[str, Any] = {"phy2log": ALIGNED, "logcnt": torch.zeros(LAYERS, EXPERTS).long()}
    Placement.over(TOPOLOGY, **good)
    with pytest.raises(ValueError, match=message):
        Placement.over(TOPOLOGY, **(good | change))


def test_placements_that_do_not_fit() -> None:
    planner = new_planner("reference")
    weight = loads("continuous", 7, LAYERS, EXPERTS)
    with pytest.raises(TypeError, match="out is a tuple, must be a Placement"):
        planner(weight, out=())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"out is of Topology\(.*\), must be of Topology"):
        planner(weight, out=Placement.empty(Topology(num_replicas=80, num_gpus=16), LAYERS, EXPERTS))
    with pytest.raises(ValueError, match=r"out.phy2log has shape \(4, 80\), must be \(5, 80\)"):
        planner(weight, out=Placement.empty(TOPOLOGY, 4, EXPERTS))
    with pytest.raises(ValueError, match="out has a log2phy of width 17, must have none"):
        planner(weight, out=Placement.empty(TOPOLOGY, LAYERS, EXPERTS, log2phy=True))
    with pytest.raises(ValueError, match=r"loads has shape \(4, 64\), must be \[layers, experts\] = \(5, 64\)"):
        planner(weight[1:])
    with pytest.raises(TypeError, match=r"topology is a tuple, must be an eplb_triton.Topology"):
        Planner((80, 16), LAYERS, EXPERTS)  # type: ignore[arg-type]
    wide = Placement.empty(TOPOLOGY, LAYERS, EXPERTS, log2phy=9)
    with pytest.raises(ValueError, match=r"other.log2phy is None, must be of a width of at most 9"):
        wide.copy_(planner(weight))
