"""A planner from the placement in force: what it takes, what it keeps, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from eplb_triton import POLICIES, Placement, Planner, Topology, plan
from tests.backends import CPU_BACKENDS
from tests.cases import loads

GROUPED = Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2)
GLOBAL = Topology(num_replicas=80, num_gpus=16)
LAYERS, EXPERTS, STEPS = 3, 64, 12


def history(seed: int) -> torch.Tensor:
    return torch.stack([loads("continuous", seed + step, LAYERS, EXPERTS) for step in range(STEPS)])


@pytest.mark.parametrize("topology", [GROUPED, GLOBAL], ids=["grouped", "global"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_steady_moves_little_and_stands_for_itself(backend: str, topology: Topology) -> None:
    planner = Planner(topology, LAYERS, EXPERTS, policy="steady", backend=backend, log2phy=True)
    live = planner(history(1))
    live.validate()
    assert live.changes is not None
    assert live.changes.written.tolist() == [80] * LAYERS
    assert live.changes.peak_before.isnan().all()
    kept = copy.deepcopy(live)
    ahead = planner(history(100), previous=live, moves=6)
    ahead.validate()
    assert live.phy2log.equal(kept.phy2log)
    assert ahead.changes is not None
    assert ahead.changes.written.equal(ahead.moved(live).slots)
    assert 0 < int(ahead.changes.written.max()) <= 6
    assert (ahead.changes.peak_after <= ahead.changes.peak_before).all()
    assert ahead.log2phy is not None
    assert ahead.log2phy.equal(ahead.slots_of_experts())
    order = ahead.deployment_order().tolist()
    changed = [layer for layer in range(LAYERS) if ahead.changes.written[layer]]
    assert sorted(order[: len(changed)]) == changed
    assert set(order[len(changed) :]) <= {-1}
    still = planner(history(100), previous=live, price=1e9)
    assert still.moved(live).slots.sum() == 0
    live.copy_(ahead)
    assert live.fingerprint() == ahead.fingerprint()


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.replan])
def test_other_policies_keep_experts_where_they_can(policy: str) -> None:
    for topology in (GROUPED, GLOBAL):
        live = plan(history(1), topology, policy, backend="cpu")
        alone = plan(history(1) + history(50) / 4, topology, policy, backend="cpu")
        ahead = plan(history(1) + history(50) / 4, topology, policy, previous=live, backend="cpu")
        ahead.validate()
        assert ahead.logcnt.equal(alone.logcnt)
        assert ahead.moved(live).slots.sum() <= alone.moved(live).slots.sum()
        held = ahead.gpu_loads(history(1).sum(0)).sort(1).values
        assert torch.allclose(held, alone.gpu_loads(history(1).sum(0)).sort(1).values)  # the same packs, other numbers
        again = plan(history(1), topology, policy, previous=live, backend="reference")
        assert again.moved(live).slots.sum() == 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_history_is_its_sum_where_nothing_replans(backend: str) -> None:
    whole = history(3).round()
    assert plan(whole, GROUPED, backend=backend).fingerprint() == plan(whole.sum(0), GROUPED).fingerprint()


def test_the_default_policy_follows_previous() -> None:
    live = plan(history(4), GLOBAL)
    assert live.policy == "balanced"
    assert plan(history(4), GLOBAL, previous=live).policy == "steady"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gpus_that_have_just_joined_are_filled(backend: str) -> None:
    slots = Placement.spread_in_order(LAYERS, EXPERTS, GLOBAL).phy2log
    slots[:, -10:] = -1
    before = Placement.from_phy2log(slots, EXPERTS, GLOBAL)
    ahead = plan(history(5), GLOBAL, previous=before, moves=0, backend=backend)
    ahead.validate()
    assert ahead.changes is not None
    assert ahead.changes.fills.tolist() == [10] * LAYERS
    assert ahead.phy2log[:, :-10].equal(slots[:, :-10])


def test_refused_previous() -> None:
    planner = Planner(GROUPED, LAYERS, EXPERTS, policy="steady")
    live = planner(history(6))
    out = planner.empty()
    with pytest.raises(ValueError, match="previous shares memory with out"):
        planner(history(6), out=live, previous=live)
    view = Placement.over(GROUPED, phy2log=live.phy2log, logcnt=torch.zeros(LAYERS, EXPERTS).long())
    with pytest.raises(ValueError, match="previous shares memory with out"):
        planner(history(6), out=live, previous=view)
    with pytest.raises(TypeError, match="previous is a Tensor, must be a Placement"):
        planner(history(6), previous=live.phy2log)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"previous is of Topology\(.*\) and \[layers, experts\]"):
        planner(history(6), previous=plan(history(6), GLOBAL))
    with pytest.raises(ValueError, match=r"price=-1.0 must be at least 0 and finite"):
        planner(history(6), previous=live, price=-1.0)
    with pytest.raises(ValueError, match=r"price=nan must be at least 0 and finite"):
        planner(history(6), previous=live, price=float("nan"))
    with pytest.raises(ValueError, match="moves=-1 must be an integer of at least 0"):
        planner(history(6), previous=live, moves=-1)
    with pytest.raises(ValueError, match="moves=3 must be None for policy='balanced', which does not replan"):
        plan(history(6), GROUPED, "balanced", previous=live, moves=3)
    with pytest.raises(ValueError, match=r"loads has 0 steps, must have at least 1"):
        planner(history(6)[:0])
    split = live.phy2log.clone()
    split[1, 0], split[1, 79] = split[1, 79].item(), split[1, 0].item()
    broken = Placement.from_phy2log(split, EXPERTS, GROUPED)
    with pytest.raises(ValueError, match="layer 1 of previous has a group on two nodes"):
        planner(history(6), out=out, previous=broken)
    assert bool((out.phy2log == -1).all())
    bad = history(6)
    bad[2, 1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"loads\[2, 1, 3\]=nan must be a finite load"):
        planner(bad, previous=live)
    with pytest.raises(ValueError, match="a placement of policy='balanced' has no predictions"):
        plan(history(6), GROUPED).deployment_order()
