"""The adapter for vLLM, against a stand-in of its modules."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.integrations import vllm
from eplb_triton.integrations.history import Windows
from eplb_triton.integrations.replanner import Replanner
from tests.serving.frameworks import (
    ComingPolicy,
    EplbModelState,
    OwnPolicy,
    UnknownPolicy,
    fake_vllm,
    loop_of_maps,
    own_map,
    rearrange,
)

LAYERS, EXPERTS, REPLICAS, RANKS = 2, 8, 12, 3


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test registers anew; the adapter logs where pytest hears it."""
    for name in ("EPLB_TRITON_VLLM", "EPLB_TRITON_SGLANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(OwnPolicy, "fails", False)
    monkeypatch.setattr(Replanner, "_backends", lambda *_: ["reference"])  # a planted fault compiles no other
    yield
    vllm.TritonEplbPolicy.weighted = None


def registered(monkeypatch: pytest.MonkeyPatch, own: type = OwnPolicy, agree: str = "0", **settings: str) -> Any:
    """The default policy after registration with these settings. AGREE=0: this process is every rank."""
    settings = {"VLLM": "1", "BACKEND": "reference", "AGREE": agree} | settings
    for name, value in settings.items():
        monkeypatch.setenv(f"EPLB_TRITON_{name}", value)
    for name, module in fake_vllm(policy=own).items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    return sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES["default"]


def random_loads(seed: int, experts: int = EXPERTS) -> Tensor:
    return torch.randint(1, 1000, (LAYERS, experts), generator=torch.Generator().manual_seed(seed))


def in_order(replicas: int = REPLICAS, experts: int = EXPERTS) -> Tensor:
    return (torch.arange(replicas) % experts).repeat(LAYERS, 1)


def check_valid(phy2log: Tensor, experts: int = EXPERTS, ranks: int = RANKS) -> None:
    assert phy2log.dtype == torch.int64
    topology = Topology(num_replicas=phy2log.shape[1], num_gpus=ranks)
    Placement.from_phy2log(phy2log, experts, topology).validate()
    for row in phy2log.tolist():
        assert set(row) == set(range(experts))


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "eplb_triton"):
        assert registered(monkeypatch, VLLM="0") is OwnPolicy
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_a_missing_framework_ends_no_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EPLB_TRITON_VLLM", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm.register()
    assert "not registered" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("POLICY", "best"), ("BACKEND", "gpu"), ("AGREE", "yes"), ("STRATEGY", "local"), ("PRICE", "-1"), ("MOVES", "x")],
)
def test_a_bad_value_is_one_error_and_the_own_planner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    assert registered(monkeypatch, **{name: value}) is OwnPolicy  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert f"EPLB_TRITON_{name}={value!r}" in record.getMessage()


def test_an_unknown_signature_is_one_warning_and_no_replacement(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert registered(monkeypatch, UnknownPolicy) is UnknownPolicy
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "0.33.0" in record.getMessage()


def test_registering_warms_up_and_says_whether_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to compile for the first plan."""
    warmed = []
    monkeypatch.setattr(Replanner, "warm", lambda self: warmed.append(self.framework))
    assert registered(monkeypatch) is vllm.TritonEplbPolicy
    assert warmed == ["vllm"]
    assert vllm.register()
    assert registered(monkeypatch, UnknownPolicy) is UnknownPolicy
    assert not vllm.register()


@pytest.fixture
def _own_logger() -> Iterator[None]:
    """What a test does to the loggers of ours and of vLLM is undone."""
    ours, theirs = logging.getLogger("eplb_triton"), logging.getLogger("vllm")
    before = ours.parent, theirs.propagate, theirs.level, list(theirs.handlers)
    yield
    ours.parent, theirs.propagate, _, theirs.handlers = before
    theirs.setLevel(before[2])


@pytest.mark.usefixtures("_own_logger")
def test_lines_go_where_vllms_go_also_where_it_configures_logging_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's logger has a handler and a level of its own, and passes nothing on."""
    policy = registered(monkeypatch)
    for level, lines in ((logging.INFO, 1), (logging.ERROR, 0)):
        heard = logging.handlers.BufferingHandler(capacity=99)
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "handlers": {"heard": {"()": lambda heard=heard: heard}},
                "loggers": {"vllm": {"handlers": ["heard"], "level": level, "propagate": False}},
            }
        )
        policy.rebalance_experts(random_loads(1), REPLICAS, 1, 1, RANKS, in_order())
        assert ["policy=steady" in record.getMessage() for record in heard.buffer] == [True] * lines


def test_registering_twice_keeps_the_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)
    vllm.register()
    assert policy.own is OwnPolicy


@pytest.mark.parametrize("name", ["steady", "balanced", "deepseek"])
def test_today_a_new_tensor_that_covers_every_expert(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    policy = registered(monkeypatch, POLICY=name)
    old = in_order()
    first = policy.rebalance_experts(random_loads(0), REPLICAS, 1, 1, RANKS, old)
    again = policy.rebalance_experts(random_loads(0), REPLICAS, 1, 1, RANKS, old[:, :])
    check_valid(first)
    assert first.data_ptr() != again.data_ptr() != old.data_ptr()
    assert torch.equal(old, in_order())


@pytest.mark.parametrize("name", ["steady", "balanced"])
def test_survivors_keep_their_slots(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of the experts that a rank holds before and after, as many as can be are where they were."""
    policy = registered(monkeypatch, POLICY=name)
    old = in_order()
    for seed in range(3):
        new = policy.rebalance_experts(random_loads(seed), REPLICAS, 1, 1, RANKS, old)
        for was, now in zip(old.view(-1, REPLICAS // RANKS), new.view(-1, REPLICAS // RANKS), strict=True):
            for slot, expert in enumerate(was.tolist()):
                if expert not in now.tolist():
                    continue
                kept = sum(a == b == expert for a, b in zip(was.tolist(), now.tolist(), strict=True))
                assert kept == min(was.tolist().count(expert), now.tolist().count(expert)), slot
        old = new


@pytest.mark.parametrize("moves", ["0", "2"])
def test_moves_are_a_limit(monkeypatch: pytest.MonkeyPatch, moves: str) -> None:
    policy = registered(monkeypatch, MOVES=moves, PRICE="0")
    new = policy.rebalance_experts(random_loads(4), REPLICAS, 1, 1, RANKS, in_order())
    assert int((new != in_order()).sum(1).max()) <= int(moves)


def test_loads_of_zero_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)
    new = policy.rebalance_experts(torch.zeros(LAYERS, EXPERTS, dtype=torch.int64), REPLICAS, 1, 1, RANKS, in_order())
    assert torch.equal(new, in_order())
    check_valid(policy.rebalance_experts(torch.zeros(LAYERS, EXPERTS, dtype=torch.int64), REPLICAS, 1, 1, RANKS))


@pytest.mark.parametrize("bad", [float("nan"), -5.0, float("inf"), 1e35])
def test_bad_loads_count_as_zero_and_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    policy = registered(monkeypatch)
    weight = random_loads(5).double()
    weight[1, 3] = bad
    zero = weight.clone()
    zero[1, 3] = 0
    got = policy.rebalance_experts(weight, REPLICAS, 1, 1, RANKS, in_order())
    policy.rebalance_experts(weight, REPLICAS, 1, 1, RANKS, in_order())
    assert torch.equal(got, registered(monkeypatch).rebalance_experts(zero, REPLICAS, 1, 1, RANKS, in_order()))
    assert caplog.text.count("count as 0") == 1


@pytest.mark.parametrize("name", ["steady", "balanced"])
@pytest.mark.parametrize(("ranks", "nodes", "groups"), [(4, 1, 1), (4, 2, 4)])
def test_ranks_that_joined_are_filled(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int, nodes: int, groups: int
) -> None:
    """Slots of -1, or a narrower map: what survivors hold is where it was, and every slot is filled."""
    policy = registered(monkeypatch, POLICY=name, MOVES="0" if name == "steady" and nodes == 1 else "")
    padded = torch.cat((in_order(), torch.full((LAYERS, 4), -1)), 1)
    for old in (padded, in_order()):
        new = policy.rebalance_experts(random_loads(6), REPLICAS + 4, groups, nodes, ranks, old)
        check_valid(new, ranks=ranks)
        if name == "steady" and nodes == 1:
            assert torch.equal(new[:, :REPLICAS], in_order())


def test_ranks_that_leave_take_nothing_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)
    new = policy.rebalance_experts(random_loads(7), 8, 1, 1, 2, in_order())
    check_valid(new, ranks=2)
    assert new.shape == (LAYERS, 8)


def test_a_placement_that_splits_groups_is_planned_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = registered(monkeypatch)
    topology = Topology(num_replicas=16, num_gpus=4, num_groups=4, num_nodes=2)
    old = in_order(16)
    for seed in range(2):
        old = policy.rebalance_experts(random_loads(seed), 16, 4, 2, 4, old)
        Placement.from_phy2log(old, EXPERTS, topology).validate()


@pytest.mark.parametrize(
    ("replicas", "groups", "nodes", "ranks", "own"),
    [(13, 1, 1, 3, True), (6, 1, 1, 3, True), (12, 3, 1, 3, False), (12, 1, 2, 4, False), (12, 0, 1, 3, False)],
)
def test_counts_that_fit_nothing_go_to_the_own_planner_and_odd_groups_are_planned_globally(
    monkeypatch: pytest.MonkeyPatch, replicas: int, groups: int, nodes: int, ranks: int, own: bool
) -> None:
    new = registered(monkeypatch).rebalance_experts(random_loads(8), replicas, groups, nodes, ranks, in_order())
    assert torch.equal(new, own_map(LAYERS, EXPERTS, replicas)) == own
    if not own:
        check_valid(new, ranks=ranks)


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
