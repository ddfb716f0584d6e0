"""vLLM's expert-parallel load balancer, planned by this package. EPLB_TRITON_VLLM=1 enables it; see docs/frameworks.md.

`register` is the entry point `vllm.general_plugins`: it puts `TritonEplbPolicy` in the place of vLLM's default policy,
and `maps_of_slots` in that of its loop over slots. vLLM is not imported before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from eplb_triton import Topology
from eplb_triton.integrations.history import Windows
from eplb_triton.integrations.in_force import can_be_kept
from eplb_triton.integrations.logical_maps import maps_of_slots
from eplb_triton.integrations.registering import guarded, refuse_unknown, takes, tell_version
from eplb_triton.integrations.replanner import Replanner
from eplb_triton.integrations.settings import Settings
from eplb_triton.integrations.weighted_maps import WeightedMaps

logger = logging.getLogger(__name__)

FRAMEWORK = "vllm"
TODAY = ("weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices")
"""Arguments of today's call."""
COMING = ("self", "context", "state")
"""Arguments of `plan_rebalance` in the coming interface."""


@dataclass
class EplbPlan:
    """What `plan_rebalance` returns where vLLM has no type of its own for it."""

    physical_to_logical_map: Tensor  # [L, P] int64 on the CPU


@dataclass
class EplbModelState:
    """What the coming interface keeps for one model."""

    num_moe_layers: int
    own: Any = None  # state of vLLM's own policy
    committed: set[int] = field(default_factory=set)  # layers of the plan that is being deployed


class TritonEplbPolicy:
    """vLLM's policy interface, today's and the coming one, over `Replanner`. Nothing raises into vLLM's threads."""

    replanner: Replanner
    own: Any  # vLLM's own policy class
    windows: Windows
    weighted: WeightedMaps | None = None

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
        """Today's call.

        Args:
            weight: [L, E] int64 on the CPU, loads of the window, summed over ranks; may be all zero.
            num_replicas: P.
            num_groups: G.
            num_nodes: N.
            num_ranks: D.
            old_global_expert_indices: [L, P_old], the map in force: -1 where a rank has joined, wider than P where some
                will leave.

        Returns:
            [L, P] int64 on the CPU, a new tensor, the same on every rank.
        """
        model = _model_of_caller()
        arguments = weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices

        def own() -> Tensor:
            made: Tensor = cls.own.rebalance_experts(*arguments)
            return made

        layers, experts = weight.shape
        mapped: Tensor
        mapped, disagreed = cls._map(
            lambda: cls.windows.add(weight, num_replicas, model),
            old_global_expert_indices,
            (experts, num_replicas, num_groups, num_nodes, num_ranks),
            _eplb_group,
            own,
            weight,
            model,
        )
        if disagreed:
            cls.windows.forget(layers, experts, model)
        return mapped

    def create_state(self, num_moe_layers: int) -> EplbModelState:
        """The coming interface: what is kept for one model, and shared with no other."""
        make = getattr(self.own, "create_state", None)
        return EplbModelState(num_moe_layers, None if make is None else make(self.own(), num_moe_layers))

    def plan_rebalance(self, context: Any, state: EplbModelState) -> Any:
        """The coming interface: a plan for `context.load_window_cpu` [samples, L, E], oldest first."""
        state.committed.clear()
        loads, old, counts = context.load_window_cpu, context.physical_to_logical_map_cpu, context.topology

        def own() -> Any:
            return self.own().plan_rebalance(context, state.own)

        mapped, _ = self._map(
            lambda: loads,
            old,
            (loads.shape[-1], context.num_replicas, counts.num_groups, counts.num_nodes, counts.num_ranks),
            lambda: context.cpu_group,
            own,
            loads[-1],
            _model_of_caller(),
        )
        return _as_plan(mapped) if isinstance(mapped, Tensor) else mapped

    def on_layer_committed(self, state: EplbModelState, plan: Any, layer: int) -> None:
        """The coming interface: `layer` of `plan` is in force."""
        state.committed.add(layer)

    @classmethod
    def _map(
        cls,
        history: Callable[[], Tensor],
        old: Tensor | None,
        counts: tuple[int, int, int, int, int],
        group: Callable[[], distributed.ProcessGroup | None],
        own: Callable[[], Any],
        loads: Tensor,
        model: object | None,
    ) -> tuple[Any, bool]:
        """The map to deploy, or what vLLM's own policy says; and whether ranks disagreed."""
        try:
            topology = cls.replanner.topology(*counts)
        except (TypeError, ValueError) as error:
            cls.replanner.tell_once(f"{error}; vLLM's own planner plans")
            return cls._own_or_kept(own, old, None, loads, counts[1]), False
        answer = cls.replanner.answer(history, old, topology, counts[0], _found(group))
        if answer.phy2log is None:
            mapped = cls._own_or_kept(own, old, topology, loads, counts[1])
        else:
            mapped = answer.phy2log.to("cpu", torch.int64).clone()  # read by another thread over many steps
        if cls.weighted is not None and isinstance(mapped, Tensor):
            cls.weighted.remember(mapped, loads, topology, model)
        return mapped, answer.disagreed

    @classmethod
    def _own_or_kept(
        cls, own: Callable[[], Any], old: Tensor | None, topology: Topology | None, loads: Tensor, num_replicas: int
    ) -> Any:
        """vLLM's own plan; where it cannot plan either, the map in force, or experts in order."""
        try:
            return own()
        except Exception:
            logger.exception("vllm: its own planner failed; the placement in force is kept, or experts put in order")
        layers, experts = loads.shape
        if old is not None and topology is not None and can_be_kept(old, topology, experts):
            return old.to("cpu", torch.int64).clone()
        return (torch.arange(num_replicas) % experts).repeat(layers, 1)


def compute_logical_maps(physical_to_logical_map: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """In the place of vLLM's: the same maps without a loop over slots, weighted by the last loads where asked for."""
    try:
        if TritonEplbPolicy.weighted is not None:
            found = TritonEplbPolicy.weighted.maps(physical_to_logical_map, num_logical_experts, _model_of_caller())
            if found is not None:
                return found
        return maps_of_slots(physical_to_logical_map, num_logical_experts)
    except Exception:
        logger.debug("vllm: its own logical maps are used", exc_info=True)
        made: tuple[Tensor, Tensor] = _OWN["compute_logical_maps"](physical_to_logical_map, num_logical_experts)
        return made


_OWN: dict[str, Any] = {}
"""vLLM's own of what is replaced or looked for, by name."""


def register() -> bool:
    """Entry point `vllm.general_plugins`. Does nothing unless EPLB_TRITON_VLLM=1; never raises.

    Returns:
        Whether this package plans from now on.
    """
    return guarded(FRAMEWORK, _register)


def _register(settings: Settings) -> bool:
    policies = import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    own = policies.get("default")
    if own is TritonEplbPolicy:
        return True  # vLLM may load plugins twice in a process
    today = takes(getattr(own, "rebalance_experts", None), TODAY)
    coming = takes(getattr(own, "plan_rebalance", None), COMING)
    if not (today or coming):
        refuse_unknown(FRAMEWORK, 'EPLB_POLICIES["default"]')
        return False
    tell_version(FRAMEWORK)
    TritonEplbPolicy.own, TritonEplbPolicy.windows = own, Windows()
    TritonEplbPolicy.replanner = Replanner(FRAMEWORK, settings)
    TritonEplbPolicy.weighted = WeightedMaps() if settings.split else None
    TritonEplbPolicy.replanner.warm()
    if TritonEplbPolicy.weighted is not None:
        TritonEplbPolicy.weighted.warm()
    state: Any = import_module("vllm.distributed.eplb.eplb_state")
    _OWN["EplbModelState"] = getattr(state, "EplbModelState", None)
    if takes(getattr(state, "compute_logical_maps", None), ("physical_to_logical_map", "num_logical_experts")):
        _OWN["compute_logical_maps"] = state.compute_logical_maps
        state.compute_logical_maps = compute_logical_maps
    else:
        refuse_unknown(FRAMEWORK, "compute_logical_maps")
    policies["default"] = TritonEplbPolicy
    return True


def _model_of_caller() -> object | None:
    """vLLM's state of the model that the caller of our caller works on, or None where it has none that we know.

    Today's call does not say which model it is for, and vLLM asks the main model and the draft model to be equal in
    experts and replicas: of equal layers too, their loads would be one history. Every caller in vLLM has the state of
    its model in a local variable.
    """
    kind, held = _OWN.get("EplbModelState"), sys._getframe(2).f_locals
    for name in ("model_state", "eplb_model_state"):
        if kind is not None and isinstance(held.get(name), kind):
            found: object = held[name]
            return found
    return None


def _eplb_group() -> distributed.ProcessGroup | None:
    """The CPU group of vLLM's EPLB, which only the thread that plans uses."""
    group: distributed.ProcessGroup = import_module("vllm.distributed.parallel_state").get_eplb_group().cpu_group
    return group


def _found(group: Callable[[], distributed.ProcessGroup | None]) -> distributed.ProcessGroup | None:
    try:
        return group()
    except Exception:
        logger.exception("vllm: its process group is not to be had")
        return None


def _as_plan(mapped: Tensor) -> Any:
    """The map as vLLM's own EplbPlan where it has one."""
    made = getattr(import_module("vllm.distributed.eplb.policy"), "EplbPlan", EplbPlan)
    return made(physical_to_logical_map=mapped)


__all__ = ["EplbModelState", "EplbPlan", "TritonEplbPolicy", "compute_logical_maps", "register"]
