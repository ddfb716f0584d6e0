"""Expert-parallel load balancing: how many replicas each expert gets, and which GPU holds which.

Symbols, used everywhere:
    L, E  MoE layers; logical experts per layer
    P     physical experts (replicas) per layer, `num_replicas`
    G, N  expert groups; nodes
    D     GPUs over all nodes (ranks)
    S     slots per GPU, P / D: slot k is on GPU k // S
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eplb_triton.policy import EFFORTS, POLICIES, Policy
from eplb_triton.topology import Topology

if TYPE_CHECKING:
    from eplb_triton.bound import lower_bound
    from eplb_triton.judging import BALANCEDNESS
    from eplb_triton.placement import Placement
    from eplb_triton.planner import Planner, plan, rebalance_experts
    from eplb_triton.serving.window import LoadWindow
    from eplb_triton.slot_maps import Moved

__version__ = "0.1.0"

__all__ = [
    "BALANCEDNESS",
    "EFFORTS",
    "POLICIES",
    "LoadWindow",
    "Moved",
    "Placement",
    "Planner",
    "Policy",
    "Topology",
    "lower_bound",
    "plan",
    "rebalance_experts",
]

_LATE = {
    "BALANCEDNESS": "judging",
    "LoadWindow": "serving.window",
    "Moved": "slot_maps",
    "Placement": "placement",
    "Planner": "planner",
    "lower_bound": "bound",
    "plan": "planner",
    "rebalance_experts": "planner",
}
"""Name -> the module that has it. They need PyTorch, which takes a second to import: the command line's help does
without."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
