"""`torch.ops.eplb_triton.rebalance`: a plan as an operator that torch.compile and torch.export can trace.

Importing this module registers it. Its results and its scratch are new tensors at each call, as any operator's. What
is kept from one call to the next belongs to the process, for good: compiled code, and on a GPU a table of a few KB for
each number of groups and nodes. Both are made at the first call of a shape, which therefore cannot be inside a capture
of a CUDA graph; compiling with mode="reduce-overhead" runs the operator before it captures.
"""

import torch
from torch import Tensor

from eplb_triton.planner import rebalance_experts
from eplb_triton.policy import resolve_policy
from eplb_triton.topology import Topology


@torch.library.custom_op("eplb_triton::rebalance", mutates_args=(), device_types=("cpu", "cuda"))
def rebalance(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, policy: str = "deepseek"
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan every layer on the device of the loads; never waits for a GPU.

    Args:
        weight: [L, E] loads, tokens per expert, real or integer, any strides. A load that is NaN, negative or above
            2**100 counts as 0 on a GPU, and is refused on the CPU.
        num_replicas: P.
        num_groups: G.
        num_nodes: N.
        num_gpus: D.
        policy: a name, see `plan`; by default DeepSeek's, as of `rebalance_experts`.

    Returns:
        phy2log [L, P], log2phy [L, E, P - E + 1] (padded with -1), logcnt [L, E], int64, on the device of `weight`, as
        `rebalance_experts`. Ties go to the lowest index.

    Raises:
        ValueError: as `rebalance_experts`.
    """
    phy2log, log2phy, logcnt = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, policy=policy)
    return phy2log, log2phy, logcnt


@rebalance.register_fake
def _shapes(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, policy: str = "deepseek"
) -> tuple[Tensor, Tensor, Tensor]:
    """Refuses at trace time what is known to be wrong then: everything but the loads themselves."""
    resolve_policy(policy)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be 2-D: [layers, experts]")
    num_layers, num_experts = weight.shape
    Topology(num_replicas=num_replicas, num_gpus=num_gpus, num_groups=num_groups, num_nodes=num_nodes).check_experts(
        num_experts
    )
    return (
        weight.new_empty((num_layers, num_replicas), dtype=torch.int64),
        weight.new_empty((num_layers, num_experts, num_replicas - num_experts + 1), dtype=torch.int64),
        weight.new_empty((num_layers, num_experts), dtype=torch.int64),
    )
