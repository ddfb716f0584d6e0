"""Stand-ins of vLLM and SGLang: the modules and names that the adapters look for, and nothing else."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class OwnPolicy:
    """vLLM's policy as far as the adapter sees it; its plan is experts in reverse order."""

    fails = False

    @classmethod
    def rebalance_experts(
        cls,
        weight: Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Tensor | None = None,
    ) -> Tensor:
        if cls.fails:
            raise ValueError("the framework's own planner failed")
        return own_map(weight.shape[0], weight.shape[1], num_replicas)


class EplbModelState:
    """What vLLM keeps of one model."""

    def __init__(self, name: str) -> None:
        self.name = name


def rearrange(policy: Any, states: list[EplbModelState], loads: list[Tensor], *others: Any) -> list[Tensor]:
    """As vLLM plans for its models in turn: the call does not say for which."""
    return [policy.rebalance_experts(load, *others) for eplb_model_state, load in zip(states, loads, strict=True)]


class UnknownPolicy:
    """Of another signature."""

    @classmethod
    def rebalance_experts(cls, loads: Tensor, topology: object) -> Tensor:
        raise NotImplementedError


class ComingPolicy:
    """The coming interface."""

    def create_state(self, num_moe_layers: int) -> dict[str, int]:
        return {"layers": num_moe_layers}

    def plan_rebalance(self, context: Any, state: Any) -> Any:
        return ("own", state)

    def on_layer_committed(self, state: Any, plan: Any, layer: int) -> None:
        """Nothing."""


def own_map(layers: int, experts: int, replicas: int) -> Tensor:
    """What a framework's own planner says here."""
    return (torch.arange(replicas - 1, -1, -1) % experts).repeat(layers, 1)


def loop_of_maps(physical_to_logical_map: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """The logical maps, slot by slot."""
    rows = physical_to_logical_map if physical_to_logical_map.dim() == 2 else physical_to_logical_map[None]
    found: list[list[list[int]]] = [[[] for _ in range(num_logical_experts)] for _ in rows]
    for layer, row in enumerate(rows.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                found[layer][expert].append(slot)
    most = max(len(slots) for layer in found for slots in layer)
    table = torch.tensor([[slots + [-1] * (most - len(slots)) for slots in layer] for layer in found], dtype=rows.dtype)
    table = table.reshape(len(found), num_logical_experts, most)
    count = torch.tensor([[len(slots) for slots in layer] for layer in found], dtype=rows.dtype)
    return (table, count) if physical_to_logical_map.dim() == 2 else (table[0], count[0])


def compute_logical_maps(physical_to_logical_map: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """vLLM's name of it."""
    return loop_of_maps(physical_to_logical_map, num_logical_experts)


def fake_vllm(group: object = None, policy: type = OwnPolicy) -> dict[str, ModuleType]:
    """Modules for sys.modules."""
    policies, state, parallel = (
        _module(f"vllm.distributed.{name}") for name in ("eplb.policy", "eplb.eplb_state", "parallel_state")
    )
    policies.EPLB_POLICIES = {"default": policy}
    state.compute_logical_maps, state.EplbModelState = compute_logical_maps, EplbModelState
    parallel.get_eplb_group = lambda: SimpleNamespace(cpu_group=group)
    parents = [_module(name) for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb")]
    return {module.__name__: module for module in (*parents, policies, state, parallel)}


class EplbAlgorithm(enum.Enum):
    deepseek = 1
    deepseek_hierarchical = 2
    elasticity_aware = 3


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    """Wraps a function, and rewrites every module attribute that is the original."""

    hooks: dict[str, Callable[..., Any]] = {}  # noqa: RUF012 - one registry a process

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        assert hook_type is HookType.AROUND
        cls.hooks[target] = hook

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook in cls.hooks.items():
            module_name, _, name = target.rpartition(".")
            original = getattr(sys.modules[module_name], name)
            wrapped = functools.wraps(original)(functools.partial(hook, original))
            for module in list(sys.modules.values()):
                for attribute, value in list(vars(module).items()) if isinstance(module, ModuleType) else []:
                    if value is original:
                        setattr(module, attribute, wrapped)


def fake_sglang() -> dict[str, ModuleType]:
    """Modules for sys.modules; `expert_location.now.metadata` is the placement in force."""
    algorithms, location, recorder, registry, elastic, context = (
        _module(f"sglang.srt.{name}")
        for name in (
            "eplb.eplb_algorithms",
            "eplb.expert_location",
            "eplb.expert_distribution",
            "plugins.hook_registry",
            "elastic_ep.elastic_ep",
            "runtime_context",
        )
    )

    def rebalance_experts(
        tokens_per_expert: Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: EplbAlgorithm,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers, experts = tokens_per_expert.shape[-2:]
        slots = own_map(layers, experts, num_physical_experts)
        return (slots, *loop_of_maps(slots, experts))

    def compute_logical_to_rank_dispatch_physical_map(
        logical_to_all_physical_map: Tensor, ep_size: int, num_physical_experts: int, ep_rank: int, seed: int = 42
    ) -> Tensor:
        return logical_to_all_physical_map[..., 0]

    location.now = SimpleNamespace(metadata=None)
    location.get_global_expert_location_metadata = lambda: location.now.metadata
    location._prefer_same_node_experts = lambda: True
    location.compute_logical_to_rank_dispatch_physical_map = compute_logical_to_rank_dispatch_physical_map
    algorithms.rebalance_experts, algorithms.EplbAlgorithm = rebalance_experts, EplbAlgorithm
    recorder.get_global_expert_distribution_recorder = lambda: recorder.now  # its ring, once a test has made one
    registry.HookRegistry, registry.HookType = HookRegistry, HookType
    elastic.ElasticEPStateManager = SimpleNamespace(instance=lambda: None)
    context.get_parallel = lambda: SimpleNamespace(nnodes=2)
    HookRegistry.hooks = {}
    return {module.__name__: module for module in (algorithms, location, recorder, registry, elastic, context)}


def _module(name: str) -> Any:
    return ModuleType(name)
