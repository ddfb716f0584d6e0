"""SGLang's expert-parallel load balancer, planned by this package. EPLB_TRITON_SGLANG=1 enables it; see
docs/frameworks.md.

`register` is the entry point `sglang.srt.plugins`: it hooks around SGLang's `rebalance_experts` and around the map of
its static dispatch. Its registry rewrites every module attribute that is the original function, so the originals come
with each call and are kept nowhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from eplb_triton import Placement, Topology
from eplb_triton.integrations.registering import guarded, refuse_unknown, takes, tell_version
from eplb_triton.integrations.replanner import Replanner
from eplb_triton.integrations.settings import Settings
from eplb_triton.serving.agreement import own_group
from eplb_triton.serving.dispatch import dispatch_map

logger = logging.getLogger(__name__)

FRAMEWORK = "sglang"
ALGORITHMS = ("deepseek", "deepseek_hierarchical", "deepseek_vec", "deepseek_vec_hierarchical")
"""Of these names we plan; of others (dead ranks, unknown ones) SGLang's own planner does."""
PLANNER = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
PLANNER_ARGUMENTS = (
    "tokens_per_expert",
    "num_physical_experts",
    "num_local_physical_experts",
    "num_groups",
    "num_nodes",
    "algorithm",
)
LOCATION = "sglang.srt.eplb.expert_location"
RECORDER = "sglang.srt.eplb.expert_distribution"
DISPATCH = f"{LOCATION}.compute_logical_to_rank_dispatch_physical_map"
DISPATCH_ARGUMENTS = ("logical_to_all_physical_map", "ep_size", "num_physical_experts", "ep_rank", "seed")

Maps = tuple[Tensor, Tensor, Tensor]


class Hooks:
    """The two hooks, over one Replanner. Neither raises what the original does not."""

    def __init__(self, settings: Settings) -> None:
        self.replanner = Replanner(FRAMEWORK, settings)
        self._group: distributed.ProcessGroup | None = None

    def rebalance_experts(self, original: Callable[..., Maps], *args: Any, **kwargs: Any) -> Maps:
        """Around SGLang's planner: [L, P], [L, E, X] padded with -1 and [L, E], on the device of the loads."""
        call = dict(zip(PLANNER_ARGUMENTS, args, strict=False)) | kwargs
        name = getattr(call.get("algorithm"), "name", None)
        loads = call.get("tokens_per_expert")
        if name not in ALGORITHMS or not isinstance(loads, Tensor) or loads.dim() not in (2, 3):
            return original(*args, **kwargs)
        experts, replicas = loads.shape[-1], call["num_physical_experts"]
        hierarchical = name.endswith("hierarchical") and call["num_groups"] is not None
        groups, nodes = (call["num_groups"], call["num_nodes"]) if hierarchical else (1, 1)
        try:
            ranks = replicas // call["num_local_physical_experts"]
            topology = self.replanner.topology(experts, replicas, groups, nodes, ranks)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            self.replanner.tell_once(f"{error}; SGLang's own planner plans")
            return original(*args, **kwargs)
        alone = _plans_alone()
        group = None if alone else self._own_group()
        old = _in_force(loads.shape[-2])
        answer = self.replanner.answer(
            lambda: _in_order_of_time(loads), old, topology, experts, group, compare=not alone
        )
        if answer.phy2log is None:
            return original(*args, **kwargs)
        placement = Placement.from_phy2log(answer.phy2log.to(loads.device, torch.int64), experts, topology)
        return placement.phy2log, placement.slots_of_experts(int(placement.logcnt.max())), placement.logcnt

    def dispatch(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Around the map of static dispatch: [L, E], the slot that this rank sends each expert's tokens to."""
        call = dict(zip(DISPATCH_ARGUMENTS, args, strict=False)) | kwargs
        try:
            slots, replicas, ranks = call["logical_to_all_physical_map"], call["num_physical_experts"], call["ep_size"]
            nodes = _nodes_of_dispatch()
            topology = Topology(num_replicas=replicas, num_gpus=ranks, num_nodes=nodes if ranks % nodes == 0 else 1)
            made = dispatch_map(call["ep_rank"], _experts_of_slots(slots, replicas), slots.shape[1], topology)
        except Exception:  # any valid slot serves: one rank may do as the original
            self.replanner.tell_once("static dispatch is SGLang's own")
            logger.debug("sglang: no dispatch map", exc_info=True)
            return original(*args, **kwargs)
        return made.to(slots.dtype)

    def _own_group(self) -> distributed.ProcessGroup | None:
        """A gloo group of all ranks, made at the first plan, which every rank makes."""
        if self._group is None:
            try:
                self._group = own_group()
            except Exception:
                logger.exception("sglang: no group to compare plans over")
        return self._group


def register() -> bool:
    """Entry point `sglang.srt.plugins`. Does nothing unless EPLB_TRITON_SGLANG=1; never raises.

    Returns:
        Whether this package plans from now on.
    """
    return guarded(FRAMEWORK, _register)


def _register(settings: Settings) -> bool:
    registry = import_module("sglang.srt.plugins.hook_registry")
    algorithms, location = import_module("sglang.srt.eplb.eplb_algorithms"), import_module(LOCATION)
    if not takes(getattr(algorithms, "rebalance_experts", None), PLANNER_ARGUMENTS):
        refuse_unknown(FRAMEWORK, PLANNER)
        return False
    tell_version(FRAMEWORK)
    hooks = Hooks(settings)
    hooks.replanner.warm()
    registry.HookRegistry.register(PLANNER, hooks.rebalance_experts, registry.HookType.AROUND)
    if takes(getattr(location, "compute_logical_to_rank_dispatch_physical_map", None), DISPATCH_ARGUMENTS):
        registry.HookRegistry.register(DISPATCH, hooks.dispatch, registry.HookType.AROUND)
    else:
        refuse_unknown(FRAMEWORK, DISPATCH)
    return True


def _in_order_of_time(loads: Tensor) -> Tensor:
    """[B, L, E], oldest step first: SGLang hands its ring over as it lies, and starts no window at the ring's row 0."""
    try:
        recorder = import_module(RECORDER).get_global_expert_distribution_recorder()
        ring = recorder._accumulator._global_physical_count_of_buffered_step
        if loads.dim() == 3 and len(loads) == len(ring._buffer):
            return loads.roll(-int(ring._curr_index), 0)  # the row that is written next is the oldest, or empty
    except (ImportError, AttributeError):  # loads of a file, or another recorder: no ring
        logger.debug("sglang: the order of steps is taken as it is", exc_info=True)
    return loads


def _in_force(num_layers: int) -> Tensor | None:
    """The map in force [L, P], or None before the first."""
    try:
        metadata = import_module(LOCATION).get_global_expert_location_metadata()
        slots = None if metadata is None else metadata.physical_to_logical_map_cpu
    except Exception:  # not set up yet
        logger.debug("sglang: no placement in force", exc_info=True)
        return None
    return slots if isinstance(slots, Tensor) and len(slots) == num_layers else None


def _plans_alone() -> bool:
    """Whether SGLang has one rank plan and send its map to the others: so it does once elastic ranks have joined."""
    try:
        state = import_module("sglang.srt.elastic_ep.elastic_ep").ElasticEPStateManager.instance()
        return state is not None and bool(state.has_scaled)
    except Exception:  # a version without elastic ranks
        return False


def _nodes_of_dispatch() -> int:
    """Nodes that dispatch prefers to stay on; 1 where SGLang does not."""
    if not import_module(LOCATION)._prefer_same_node_experts():
        return 1
    return int(import_module("sglang.srt.runtime_context").get_parallel().nnodes)


def _experts_of_slots(slots: Tensor, num_replicas: int) -> Tensor:
    """[L, P] int64 from slots of experts [L, E, X], padded with -1."""
    layers, experts, width = slots.shape
    flat = slots.to(torch.int64).reshape(layers, -1)
    expert = torch.arange(experts, device=slots.device).repeat_interleave(width).expand(layers, -1)
    held = torch.full((layers, num_replicas + 1), -1, dtype=torch.int64, device=slots.device)
    held.scatter_(1, torch.where(flat < 0, num_replicas, flat), expert)
    return held[:, :num_replicas].contiguous()
