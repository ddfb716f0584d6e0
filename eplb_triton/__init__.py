"""Expert-parallel load balancing: how many replicas each expert gets, and which GPU holds which.

Symbols, used everywhere:
    L, E  MoE layers; logical experts per layer
    P     physical experts (replicas) per layer, `num_replicas`
    G, N  expert groups; nodes
    D     GPUs over all nodes (ranks)
    S     slots per GPU, P / D: slot k is on GPU k // S
"""

from eplb_triton.bound import lower_bound
from eplb_triton.placement import BALANCEDNESS, Moved, Placement
from eplb_triton.planner import Planner, plan, rebalance_experts
from eplb_triton.policy import EFFORTS, POLICIES, Policy
from eplb_triton.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "BALANCEDNESS",
    "EFFORTS",
    "POLICIES",
    "Moved",
    "Placement",
    "Planner",
    "Policy",
    "Topology",
    "lower_bound",
    "plan",
    "rebalance_experts",
]
