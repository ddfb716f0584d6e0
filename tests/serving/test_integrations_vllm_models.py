"""The adapter for vLLM, against a stand-in of its modules: faults, switches, models in turn, the coming interface."""

from __future__ import annotations

import logging
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eplb_triton import Placement
from eplb_triton.integrations.history import Windows
from tests.serving.frameworks import ComingPolicy, EplbModelState, OwnPolicy, loop_of_maps, own_map, rearrange
from tests.serving.in_vllm import EXPERTS, LAYERS, RANKS, REPLICAS, check_valid, in_order, random_loads, registered

pytestmark = pytest.mark.usefixtures("_nothing_left")


def test_nothing_raises_where_nobody_can_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)
    monkeypatch.setattr(OwnPolicy, "fails", True)
    assert torch.equal(policy.rebalance_experts(random_loads(0), 13, 1, 1, 3, None), in_order(13))


def test_a_backend_that_raises_gives_way_to_one_of_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = registered(monkeypatch)
    want = policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order())
    policy = registered(monkeypatch, BACKEND="triton")  # refuses a CPU
    monkeypatch.setattr(policy.replanner, "_backends", lambda *_: ["triton", "reference"])
    assert torch.equal(policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order()), want)
    assert "backend triton made no plan" in caplog.text


def test_no_backend_keeps_the_map_in_force(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    policy = registered(monkeypatch)

    def fails(*_: object) -> object:
        raise MemoryError("planted")

    monkeypatch.setattr(policy.replanner, "_by", fails)
    assert torch.equal(policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order()), in_order())
    assert "the placement in force is kept" in caplog.text


def test_an_invalid_plan_is_not_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)

    def lacks_an_expert(self: Placement) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(Placement, "validate", lacks_an_expert)
    assert torch.equal(policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order()), in_order())


def test_without_a_group_to_compare_over_the_own_planner_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch, agree="1")
    new = policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order())
    assert torch.equal(new, own_map(LAYERS, EXPERTS, REPLICAS))


def test_shadow_plans_and_moves_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    policy = registered(monkeypatch, SHADOW="1")
    with caplog.at_level(logging.INFO, "eplb_triton"):
        assert torch.equal(policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order()), in_order())
    assert "shadow, nothing moves" in caplog.text


def test_a_stop_file_works_while_serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    policy = registered(monkeypatch, STOP_FILE=str(tmp_path / "stop"), agree="1")
    arguments = random_loads(1), 8, 1, 1, 1, in_order(8)
    ours = policy.rebalance_experts(*arguments)
    (tmp_path / "stop").touch()
    assert torch.equal(policy.rebalance_experts(*arguments), own_map(LAYERS, EXPERTS, 8))
    (tmp_path / "stop").unlink()
    assert torch.equal(policy.rebalance_experts(*arguments), ours)


def test_two_models_in_turn_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it gets alone."""
    alone = registered(monkeypatch)
    want = [alone.rebalance_experts(random_loads(s), REPLICAS, 1, 1, RANKS, in_order()) for s in range(3)]
    both = registered(monkeypatch)
    for seed in range(3):
        got = both.rebalance_experts(random_loads(seed), REPLICAS, 1, 1, RANKS, in_order())
        both.rebalance_experts(random_loads(9 + seed, 6), 9, 1, 1, RANKS, in_order(9, 6))
        assert torch.equal(got, want[seed])


def test_a_main_model_and_a_draft_model_of_equal_counts_share_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's call does not say which of the two it is for; each gets what it gets alone."""
    arguments = REPLICAS, 1, 1, RANKS, in_order()
    loads = [[random_loads(seed), random_loads(seed).flip(1)] for seed in range(3)]
    alone = []
    for which in (0, 1):
        policy, state = registered(monkeypatch), EplbModelState("alone")
        alone.append([rearrange(policy, [state], [both[which]], *arguments)[0] for both in loads])
    policy, states = registered(monkeypatch), [EplbModelState("main"), EplbModelState("draft")]
    for window, both in enumerate(loads):
        got = rearrange(policy, states, both, *arguments)
        assert all(torch.equal(got[which], alone[which][window]) for which in (0, 1)), window
    assert not torch.equal(alone[0][2], alone[1][2])


def test_windows_are_bounded_and_start_anew_when_ranks_change() -> None:
    windows = Windows(steps=3, models=2)
    for seed in range(5):
        history = windows.add(random_loads(seed), REPLICAS)
    assert torch.equal(history, torch.stack([random_loads(seed) for seed in (2, 3, 4)]))
    assert len(windows.add(torch.zeros_like(random_loads(0)), REPLICAS)) == 3
    assert len(windows.add(random_loads(0), REPLICAS + 3)) == 1
    assert len(windows.add(random_loads(0), REPLICAS)) == 1
    windows.forget(LAYERS, EXPERTS)
    assert len(windows.add(random_loads(0), REPLICAS)) == 1


def test_windows_of_a_model_end_with_it_and_those_used_least_recently_go_first() -> None:
    windows, models = Windows(models=2), [EplbModelState(str(number)) for number in range(3)]
    for model in models[:2]:
        assert len(windows.add(random_loads(0), REPLICAS, model)) == 1
    assert len(windows.add(random_loads(1), REPLICAS, models[0])) == 2
    assert len(windows.add(random_loads(0), REPLICAS, models[2])) == 1
    assert len(windows.add(random_loads(2), REPLICAS, models[0])) == 3
    assert len(windows.add(random_loads(1), REPLICAS, models[1])) == 1  # it went when the third came
    reference = weakref.ref(models.pop(0))
    assert reference() is None


def test_a_change_of_ranks_of_one_model_leaves_the_history_of_another() -> None:
    windows, main, draft = Windows(), EplbModelState("main"), EplbModelState("draft")
    for model in (main, draft):
        windows.add(random_loads(0), REPLICAS, model)
    assert len(windows.add(random_loads(1), REPLICAS + 3, main)) == 1
    assert len(windows.add(random_loads(1), REPLICAS, draft)) == 2
    windows.forget(LAYERS, EXPERTS, draft)
    assert len(windows.add(random_loads(1), REPLICAS + 3, main)) == 2
    assert len(windows.add(random_loads(1), REPLICAS, draft)) == 1


def context_of(seed: int) -> Any:
    return SimpleNamespace(
        load_window_cpu=torch.stack([random_loads(seed), random_loads(seed + 1)]),
        physical_to_logical_map_cpu=in_order(),
        num_replicas=REPLICAS,
        topology=SimpleNamespace(num_groups=1, num_nodes=1, num_ranks=RANKS),
        cpu_group=None,
    )


def test_the_coming_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch, ComingPolicy)()
    state = policy.create_state(LAYERS)
    plan = policy.plan_rebalance(context_of(0), state)
    check_valid(plan.physical_to_logical_map)
    policy.on_layer_committed(state, plan, 1)
    assert state.committed == {1}
    assert state.own == {"layers": LAYERS}
    assert policy.create_state(LAYERS).committed == set()


def test_the_coming_interface_falls_back_on_the_own_policy_with_its_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch, ComingPolicy, agree="1")()
    state = policy.create_state(LAYERS)
    assert policy.plan_rebalance(context_of(0), state) == ("own", {"layers": LAYERS})


def test_split_repeats_slots_by_the_last_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch, SPLIT="1")
    mapped = policy.rebalance_experts(random_loads(3), REPLICAS, 1, 1, RANKS, in_order())
    state: Any = sys.modules["vllm.distributed.eplb.eplb_state"]
    table, count = state.compute_logical_maps(mapped, EXPERTS)
    assert table.shape == (LAYERS, EXPERTS, 16)
    assert (count == 16).all()
    for layer, row in enumerate(mapped.tolist()):
        one, _ = state.compute_logical_maps(mapped[layer], EXPERTS)
        assert torch.equal(one, table[layer])
        for expert in range(EXPERTS):
            assert {row[slot] for slot in table[layer, expert].tolist()} == {expert}
    unknown = in_order().flip(1)
    for got, want in zip(state.compute_logical_maps(unknown, EXPERTS), loop_of_maps(unknown, EXPERTS), strict=True):
        assert torch.equal(got, want)
