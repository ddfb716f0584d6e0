"""plan and rebalance_experts: checks -> policy -> one backend -> Placement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eplb_triton.placement import Placement
from eplb_triton.policy import Policy, resolve_policy
from eplb_triton.topology import Topology

BACKENDS = ("auto", "reference", "triton")
MAX_LOAD = 2.0**100
"""Largest load accepted: sums of any number of experts stay finite in float32."""

_PlanLayers = Callable[[Tensor, Topology, Policy], tuple[Tensor, Tensor, Tensor]]


def plan(
    weight: Tensor,
    topology: Topology,
    *,
    policy: str | Policy = "deepseek",
    backend: str = "auto",
) -> Placement:
    """Plan how many replicas each expert gets and which GPU holds which.

    Args:
        weight: [L, E], load of each logical expert, in tokens or any unit; any real or integer dtype, any strides.
            Each element is rounded once to float32.
        topology: replicas, groups, nodes and GPUs.
        policy: a name of `POLICIES`, or a Policy.
        backend: `auto`, or `reference` (plain PyTorch, on the CPU; loads on another device are copied there and the
            plan is copied back).

    Returns:
        A valid Placement on the device of `weight`, the same bits on every device and machine. Ties anywhere go to
        the lowest index.

    Raises:
        TypeError: `weight` is no tensor.
        ValueError: `weight` is not 2-D, is complex or boolean, has no experts, or holds a load that is NaN, negative or
            above 2**100; the topology does not fit it; the policy or backend is unknown.
    """
    chosen = resolve_policy(policy)
    plan_layers = _backend(backend)
    _check_shape(weight)
    topology.check_experts(weight.shape[1])
    loads = _float32_loads(weight)
    maps = plan_layers(loads, topology, chosen)
    phy2log, phyrank, logcnt = (slots.to(weight.device) for slots in maps)
    return Placement(phy2log, phyrank, logcnt, topology, chosen.name)


def rebalance_experts(
    weight: Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: str | Policy = "deepseek",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's EPLB entry point, same arguments, same results.

    Args:
        weight: [L, E], load of each logical expert.
        num_replicas: P, physical experts a layer, a multiple of `num_gpus`.
        num_groups: G, expert groups a layer.
        num_nodes: N, nodes.
        num_gpus: D, GPUs over all nodes.
        policy: see `plan`.
        backend: see `plan`.

    Returns:
        phy2log [L, P], log2phy [L, E, P - E + 1] (padded with -1), logcnt [L, E], int64, on the device of `weight`.

    Raises:
        TypeError, ValueError: as `Topology` and `plan`.

    Source: https://github.com/deepseek-ai/EPLB
    """
    placement = plan(weight, Topology(num_replicas, num_groups, num_nodes, num_gpus), policy=policy, backend=backend)
    return placement.phy2log, placement.log2phy, placement.logcnt


def _backend(name: str) -> _PlanLayers:
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown, must be one of {', '.join(BACKENDS)}")
    if name == "triton":
        raise ValueError("backend='triton' is not built yet; use backend='auto' or backend='reference'")
    from eplb_reference import plan_layers  # noqa: PLC0415 - it imports this package's topology and policy

    return plan_layers


def _check_shape(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, must be a torch.Tensor [layers, experts]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be 2-D: [layers, experts]")
    if weight.dtype == torch.bool or weight.is_complex():
        raise ValueError(f"weight has dtype {weight.dtype}, must be real or integer")


def _float32_loads(weight: Tensor) -> Tensor:
    """`weight` on the CPU, each load rounded once to float32, -0 made 0, every one of them usable."""
    loads = weight.detach().cpu().to(torch.float32).contiguous() + 0.0
    bad = ~((loads >= 0) & (loads <= MAX_LOAD))
    if bad.any():
        layer, expert = bad.nonzero()[0].tolist()
        raise ValueError(
            f"weight[{layer}, {expert}]={weight[layer, expert].item()!r} must be a finite load of at least 0 and at "
            "most 2**100; it is the first that is not"
        )
    return loads
