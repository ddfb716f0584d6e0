"""The adapter for SGLang, against a stand-in of its modules and a registry that rewrites attributes as its own does."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.integrations import sglang
from eplb_triton.integrations.replanner import Replanner
from tests.serving.frameworks import EplbAlgorithm, HookRegistry, fake_sglang, loop_of_maps, own_map

LAYERS, EXPERTS, REPLICAS, RANKS = 2, 8, 16, 4


@pytest.fixture
def srt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's modules, not yet hooked."""
    for name in ("EPLB_TRITON_VLLM", "EPLB_TRITON_SGLANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Replanner, "_backends", lambda *_: ["reference"])  # a planted fault compiles no other
    modules = fake_sglang()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    other: Any = ModuleType("sglang.srt.somewhere")
    other.planner = modules["sglang.srt.eplb.eplb_algorithms"].rebalance_experts
    monkeypatch.setitem(sys.modules, "sglang.srt.somewhere", other)
    return SimpleNamespace(
        algorithms=modules["sglang.srt.eplb.eplb_algorithms"],
        location=modules["sglang.srt.eplb.expert_location"],
        elastic=modules["sglang.srt.elastic_ep.elastic_ep"],
        recorder=modules["sglang.srt.eplb.expert_distribution"],
        other=other,
    )


def hooked(monkeypatch: pytest.MonkeyPatch, agree: str = "0", **settings: str) -> None:
    settings = {"SGLANG": "1", "BACKEND": "reference", "AGREE": agree} | settings
    for name, value in settings.items():
        monkeypatch.setenv(f"EPLB_TRITON_{name}", value)
    sglang.register()
    HookRegistry.apply_hooks()


def history(seed: int = 0, steps: int = 5) -> Tensor:
    """[B, L, E] int32, of which rows that the recorder has not filled are zero."""
    loads = torch.randint(1, 500, (steps, LAYERS, EXPERTS), generator=torch.Generator().manual_seed(seed)).int()
    return torch.cat((loads, torch.zeros(3, LAYERS, EXPERTS, dtype=torch.int32)))


def call(srt: Any, loads: Tensor, algorithm: EplbAlgorithm = EplbAlgorithm.deepseek, **other: Any) -> Any:
    arguments = {
        "tokens_per_expert": loads,
        "num_physical_experts": REPLICAS,
        "num_local_physical_experts": REPLICAS // RANKS,
        "num_groups": 4,
        "num_nodes": 2,
        "algorithm": algorithm,
    }
    return srt.algorithms.rebalance_experts(**arguments | other)


def in_force(srt: Any, slots: Tensor) -> None:
    srt.location.now.metadata = SimpleNamespace(physical_to_logical_map_cpu=slots)


def in_order() -> Tensor:
    return (torch.arange(REPLICAS) % EXPERTS).repeat(LAYERS, 1)


def test_off_unless_asked_for(srt: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "eplb_triton"):
        hooked(monkeypatch, SGLANG="0")
    assert HookRegistry.hooks == {}
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_a_bad_value_is_one_error_and_no_hook(
    srt: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hooked(monkeypatch, POLICY="best")
    assert HookRegistry.hooks == {}
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "EPLB_TRITON_POLICY='best'" in record.getMessage()


def test_registering_warms_up_and_says_whether_it_hooks(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed = []
    monkeypatch.setattr(Replanner, "warm", lambda self: warmed.append(self.framework))
    assert not sglang.register()
    monkeypatch.setenv("EPLB_TRITON_SGLANG", "1")
    assert sglang.register()
    assert warmed == ["sglang"]


def test_negative_loads_count_as_zero_and_are_told_once(
    srt: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hooked(monkeypatch)
    zero, bad = history(), history()
    zero[1, 1, 3], bad[1, 1, 3] = 0, -5
    want = call(srt, zero)[0]
    assert [torch.equal(call(srt, bad)[0], want) for _ in range(2)] == [True, True]
    assert caplog.text.count("count as 0") == 1


def test_an_unknown_signature_is_one_warning_and_no_hook(
    srt: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    srt.algorithms.rebalance_experts = lambda loads: loads
    hooked(monkeypatch)
    assert HookRegistry.hooks == {}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "0.5.23" in record.getMessage()


@pytest.mark.parametrize("policy", ["steady", "balanced", "deepseek"])
def test_three_maps_that_belong_together(srt: Any, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    hooked(monkeypatch, POLICY=policy)
    phy2log, log2phy, logcnt = call(srt, history())
    assert phy2log.shape == (LAYERS, REPLICAS)
    assert not torch.equal(phy2log, own_map(LAYERS, EXPERTS, REPLICAS))
    for got, want in zip((log2phy, logcnt), loop_of_maps(phy2log, EXPERTS), strict=True):
        assert torch.equal(got, want)
    Placement.from_phy2log(phy2log, EXPERTS, Topology(num_replicas=REPLICAS, num_gpus=RANKS)).validate()


def test_the_registry_that_rewrites_attributes_does_not_make_a_fallback_call_itself(
    srt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead ranks, unknown names and counts that fit nothing go to the original, also where it was imported by name."""
    hooked(monkeypatch)
    own = own_map(LAYERS, EXPERTS, REPLICAS)
    assert torch.equal(call(srt, history(), EplbAlgorithm.elasticity_aware)[0], own)
    assert torch.equal(call(srt, history(), SimpleNamespace(name="new"))[0], own)  # type: ignore[arg-type]
    assert torch.equal(call(srt, history(), num_local_physical_experts=5)[0], own)
    assert srt.other.planner is srt.algorithms.rebalance_experts


def test_the_name_of_the_algorithm_says_whether_groups_stay_on_nodes(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked(monkeypatch, POLICY="balanced")
    nodes = Topology(num_replicas=REPLICAS, num_gpus=RANKS, num_groups=4, num_nodes=2)
    got, *_ = call(srt, history(), EplbAlgorithm.deepseek_hierarchical)
    Placement.from_phy2log(got, EXPERTS, nodes).validate()
    flat = Placement.from_phy2log(call(srt, history(), EplbAlgorithm.deepseek)[0], EXPERTS, nodes)
    with pytest.raises(ValueError, match="group"):
        flat.validate()
    call(srt, history(), EplbAlgorithm.deepseek_hierarchical, num_groups=None)


@pytest.mark.parametrize("policy", ["steady", "balanced"])
def test_rows_that_were_not_recorded_change_nothing(srt: Any, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    hooked(monkeypatch, POLICY=policy)
    in_force(srt, in_order())
    assert torch.equal(call(srt, history())[0], call(srt, history()[:5])[0])


@pytest.mark.parametrize("steps", [5, 8])
def test_the_ring_of_steps_is_put_in_order_of_time(srt: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Traffic has changed: the newest steps count, wherever in the ring they lie; of a file's loads, as they lie."""
    hooked(monkeypatch)
    in_force(srt, in_order())
    loads = history(steps=8)[:8]
    loads[:4, :, 0] *= 50
    loads[4:, :, 5] *= 50
    loads[steps:] = 0
    want = call(srt, loads)[0]
    others = []
    for at in range(1, 8):
        ring = SimpleNamespace(_buffer=loads, _curr_index=(steps + at) % 8)
        srt.recorder.now = SimpleNamespace(_accumulator=SimpleNamespace(_global_physical_count_of_buffered_step=ring))
        assert torch.equal(call(srt, loads.roll(at, 0))[0], want), at
        del srt.recorder.now
        others.append(torch.equal(call(srt, loads.roll(at, 0))[0], want))
    assert steps < 8 or not all(others)


def test_the_placement_in_force_is_planned_on(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked(monkeypatch, MOVES="1", PRICE="0")
    in_force(srt, in_order())
    assert int((call(srt, history())[0] != in_order()).sum(1).max()) <= 1
    assert torch.equal(call(srt, torch.zeros_like(history()))[0], in_order())


def test_shadow_and_a_rank_that_fails_keep_the_map_in_force(
    srt: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_force(srt, in_order())
    with caplog.at_level(logging.INFO, "eplb_triton"):
        hooked(monkeypatch, SHADOW="1")
        assert torch.equal(call(srt, history())[0], in_order())
    assert "shadow, nothing moves" in caplog.text
    monkeypatch.setattr(Placement, "validate", lambda self: 1 / 0)
    assert torch.equal(call(srt, history())[0], in_order())
    assert "the placement in force is kept" in caplog.text


def test_ranks_are_compared_unless_one_plans_for_all(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch.distributed is not there to compare over: SGLang's own planner plans, but where one rank plans."""
    hooked(monkeypatch, agree="1")
    assert torch.equal(call(srt, history())[0], own_map(LAYERS, EXPERTS, REPLICAS))
    srt.elastic.ElasticEPStateManager.instance = lambda: SimpleNamespace(has_scaled=True)
    assert not torch.equal(call(srt, history())[0], own_map(LAYERS, EXPERTS, REPLICAS))


def test_the_map_of_static_dispatch(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same GPU, else same node, else any; and every rank's tokens go to a slot of the expert."""
    hooked(monkeypatch)
    slots, log2phy, _ = call(srt, history())
    per_gpu = REPLICAS // RANKS
    for rank in range(RANKS):
        made = srt.location.compute_logical_to_rank_dispatch_physical_map(log2phy, RANKS, REPLICAS, rank)
        assert torch.equal(slots.gather(1, made), torch.arange(EXPERTS).expand(LAYERS, -1))
        for layer in range(LAYERS):
            for expert, slot in enumerate(made[layer].tolist()):
                gpus = {int(s) // per_gpu for s in (slots[layer] == expert).nonzero()}
                near = {rank} & gpus or {gpu for gpu in gpus if gpu // 2 == rank // 2} or gpus
                assert slot // per_gpu in near


def test_a_dispatch_map_that_cannot_be_made_is_sglangs(srt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked(monkeypatch)
    _, log2phy, _ = call(srt, history())
    made = srt.location.compute_logical_to_rank_dispatch_physical_map(log2phy, RANKS, REPLICAS, ep_rank=99)
    assert torch.equal(made, log2phy[..., 0])
