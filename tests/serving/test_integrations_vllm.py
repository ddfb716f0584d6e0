"""The adapter for vLLM, against a stand-in of its modules: registering, and today's call."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
import sys
from collections.abc import Iterator

import pytest
import torch

from eplb_triton import Placement, Topology
from eplb_triton.integrations import vllm
from eplb_triton.integrations.replanner import Replanner
from tests.serving.frameworks import OwnPolicy, UnknownPolicy, own_map
from tests.serving.in_vllm import EXPERTS, LAYERS, RANKS, REPLICAS, check_valid, in_order, random_loads, registered

pytestmark = pytest.mark.usefixtures("_nothing_left")


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
