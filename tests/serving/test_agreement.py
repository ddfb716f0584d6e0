"""Ranks agree before weights move: three processes, and a fault planted on one of them only."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from eplb_triton.integrations import sglang, vllm
from eplb_triton.serving import agreement
from tests.serving.frameworks import EplbAlgorithm, HookRegistry, fake_sglang, fake_vllm, own_map
from tests.serving.ranks import run_ranks

LAYERS, EXPERTS, REPLICAS, RANKS = 2, 8, 12, 3
PRINT = "0123456789abcdef"
FAULTS = ("none", "other map", "no plan", "loads", "none again", "stop file", "stop file gone")


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def old_map() -> torch.Tensor:
    return (torch.arange(REPLICAS) % EXPERTS).repeat(LAYERS, 1)


def on_rank(rank: int) -> dict[str, Any]:
    """All scenarios in turn: three processes are started once."""
    heard = Heard()
    logging.getLogger("eplb_triton").addHandler(heard)
    logging.getLogger("eplb_triton").setLevel(logging.INFO)
    group = agreement.own_group()
    odd = rank == 1
    found: dict[str, Any] = {
        "same": agreement.agree(PRINT, group),
        "last digit": agreement.agree(PRINT[:-1] + "0" if odd else PRINT, group),
        "first digit": agreement.agree("f" + PRINT[1:] if odd else PRINT, group),
        "specification": agreement.agree(PRINT, group, spec_version=1 if odd else 2),
        "version": agreement.agree(PRINT, group, version="0.0.9" if odd else "0.1.0"),
        "failed": agreement.agree(None if odd else PRINT, group),
        "stop": agreement.agree(PRINT, group, stop=odd),
    }
    os.environ |= {"EPLB_TRITON_VLLM": "1", "EPLB_TRITON_BACKEND": "reference"}
    os.environ["EPLB_TRITON_STOP_FILE"] = f"/nonexistent/{rank}"
    sys.modules.update(fake_vllm(distributed.group.WORLD))
    vllm.register()
    policy = sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES["default"]
    made = policy.replanner._by
    loads = torch.arange(1, LAYERS * EXPERTS + 1).reshape(LAYERS, EXPERTS) ** 2
    for fault in FAULTS:
        heard.lines.clear()
        weight = loads.clone()
        policy.replanner._by = made
        policy.replanner._stop_asked = lambda fault=fault: odd and fault == "stop file"
        if odd and fault == "other map":
            policy.replanner._by = lambda *args: planted(made(*args))
        elif odd and fault == "no plan":
            policy.replanner._by = broken
        elif odd and fault == "loads":
            weight[0] = weight[0].flip(0)
        found[fault] = policy.rebalance_experts(weight, REPLICAS, 1, 1, RANKS, old_map()).tolist(), list(heard.lines)
    heard.lines.clear()  # to one rank, over the group of all that are still there
    policy.replanner._by = (lambda *args: planted(made(*args))) if odd else made
    found["scaled to one"] = policy.rebalance_experts(loads, 8, 1, 1, 1, old_map()).tolist(), list(heard.lines)
    found |= in_sglang(odd, heard, loads)
    parallel: Any = sys.modules["vllm.distributed.parallel_state"]
    parallel.get_eplb_group = lambda: SimpleNamespace(cpu_group=group_of_its_own())
    for fault, by in (("elastic group", made), ("other map, elastic group", lambda *args: planted(made(*args)))):
        heard.lines.clear()
        policy.replanner._by = by if odd else made
        found[fault] = policy.rebalance_experts(loads, REPLICAS, 1, 1, RANKS, old_map()).tolist(), list(heard.lines)
    return found


def in_sglang(odd: bool, heard: Heard, loads: torch.Tensor) -> dict[str, Any]:
    """What SGLang's planner says through our hook, sound and with another plan on one rank."""
    os.environ |= {"EPLB_TRITON_SGLANG": "1"}
    modules = fake_sglang()
    sys.modules.update(modules)
    sglang.register()
    HookRegistry.apply_hooks()
    algorithms, location = (modules[f"sglang.srt.eplb.{name}"] for name in ("eplb_algorithms", "expert_location"))
    location.now.metadata = SimpleNamespace(physical_to_logical_map_cpu=old_map())
    replanner = HookRegistry.hooks[sglang.PLANNER].__self__.replanner  # type: ignore[attr-defined]
    made, found = replanner._by, {}
    for fault in ("sglang", "other map in sglang"):
        heard.lines.clear()
        if odd and fault != "sglang":
            replanner._by = lambda *args: planted(made(*args))
        maps = algorithms.rebalance_experts(
            tokens_per_expert=loads.int().unsqueeze(0),
            num_physical_experts=REPLICAS,
            num_local_physical_experts=REPLICAS // RANKS,
            num_groups=None,
            num_nodes=1,
            algorithm=EplbAlgorithm.deepseek,
        )
        found[fault] = maps[0].tolist(), list(heard.lines)
    return found


@cache
def group_of_its_own() -> Any:
    """A gloo group that torch.distributed does not know of, as vLLM makes them where ranks join and leave."""
    store = torch._C._distributed_c10d.PrefixStore("own", distributed.distributed_c10d._get_default_store())
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    group = distributed.ProcessGroup(store, rank, ranks)
    gloo = distributed.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60))
    group._set_default_backend(distributed.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), distributed.ProcessGroup.BackendType.GLOO, gloo)
    return group


def planted(made: Any) -> Any:
    slots = made.placement.phy2log
    slots[0, [0, -1]] = slots[0, [-1, 0]]
    made.placement.refresh()
    return made


def broken(*_: Any) -> Any:
    raise RuntimeError("planted")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_rank, RANKS, tmp_path_factory.mktemp("ranks"))


def test_every_rank_finds_the_same(ranks: list[dict[str, Any]]) -> None:
    for name in ("same", "last digit", "first digit", "specification", "version", "failed", "stop"):
        assert len({rank[name] for rank in ranks}) == 1, name


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("last digit", "ranks differ in plan"),
        ("first digit", "ranks differ in plan"),
        ("specification", "ranks differ in specification"),
        ("version", "ranks differ in package version"),
        ("failed", "a rank could not plan"),
    ],
)
def test_a_difference_on_one_rank_is_named(ranks: list[dict[str, Any]], what: str, reason: str) -> None:
    assert ranks[0][what] == (False, False, reason)


def test_equal_plans_agree_and_one_rank_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["same"] == (True, False, "")
    assert ranks[0]["stop"] == (True, True, "")


@pytest.mark.parametrize("when", ["none", "none again", "stop file gone", "elastic group", "sglang"])
def test_ranks_that_agree_deploy_a_new_map_and_rank_0_says_so(ranks: list[dict[str, Any]], when: str) -> None:
    """Also after a fault, and after a stop file that one rank alone saw: histories stay alike."""
    maps = [rank[when][0] for rank in ranks]
    assert maps[0] == maps[1] == maps[2] != old_map().tolist()
    said = [[line for line in rank[when][1] if "policy=steady" in line] for rank in ranks]
    assert [len(lines) for lines in said] == [1, 0, 0]
    for word in ("backend=reference", "balancedness 0.", "slots", "fingerprint=", "specification 2", "eplb_triton 0."):
        assert word in said[0][0]


@pytest.mark.parametrize("fault", ["other map", "no plan", "loads", "other map, elastic group", "other map in sglang"])
def test_a_fault_on_one_rank_is_told_by_every_rank_and_moves_nothing(ranks: list[dict[str, Any]], fault: str) -> None:
    for rank in ranks:
        kept, lines = rank[fault]
        assert kept == old_map().tolist()
        assert any("the placement in force is kept" in line for line in lines), lines


def test_ranks_that_leave_are_asked_too(ranks: list[dict[str, Any]]) -> None:
    """One rank stays, whose plan alone counts: those that leave send it their weights by the same map."""
    for rank in ranks:
        planned, lines = rank["scaled to one"]
        assert planned == own_map(LAYERS, EXPERTS, 8).tolist()
        assert any("ranks differ in plan; the framework's own planner plans" in line for line in lines), lines


def test_a_stop_file_of_one_rank_gives_all_ranks_back_to_the_framework(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        planned, lines = rank["stop file"]
        assert planned == own_map(LAYERS, EXPERTS, REPLICAS).tolist()
        assert any("stopped by" in line for line in lines), lines


def test_a_rank_alone_agrees_with_itself() -> None:
    assert agreement.agree(PRINT, None) == (True, False, "")
    assert agreement.agree(None, None) == (False, False, "a rank could not plan")
    assert agreement.own_group() is None


def test_a_group_that_is_none_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    verdict = agreement.agree(PRINT, object())  # type: ignore[arg-type]
    assert not verdict.agreed
    assert verdict.reason.startswith("other ranks cannot be reached")
    assert "ranks cannot be compared" in caplog.text
