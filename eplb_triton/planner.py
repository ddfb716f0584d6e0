"""plan and rebalance_experts: checks -> policy -> one backend -> Placement."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from eplb_triton.placement import Placement
from eplb_triton.policy import DEFAULT_POLICY, Policy, resolve_policy
from eplb_triton.topology import Topology

if TYPE_CHECKING:
    from eplb_triton.kernels.launcher import Outputs
    from eplb_triton.kernels.specs import Workspace

BACKENDS = ("auto", "triton", "cpu", "reference")
MAX_LOAD = 2.0**100
"""Largest load accepted: sums of any number of experts stay finite in float32."""

_PlanLayers = Callable[[Tensor, Topology, Policy], tuple[Tensor, Tensor, Tensor]]


def plan(
    weight: Tensor,
    topology: Topology,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    backend: str = "auto",
    dtype: torch.dtype = torch.int64,
    check: Literal["async", "sync"] = "async",
    out: Outputs | None = None,
    workspace: Workspace | None = None,
) -> Placement:
    """Plan how many replicas each expert gets and which GPU holds which.

    Args:
        weight: [L, E], load of each logical expert, in tokens or any unit; any real or integer dtype, any strides.
            Each element is rounded once to float32.
        topology: replicas, groups, nodes and GPUs.
        policy: a name of `POLICIES`, `balanced_low` or `balanced_high` (`EFFORTS`), or a Policy.
        backend: `triton` plans on the GPU that holds the loads, on the current stream, without waiting for it; `cpu`
            is compiled by Numba, `reference` is plain PyTorch on the CPU: both copy loads from another device and the
            maps back. `auto` is `triton` for loads on a GPU, else `cpu` where Numba can be imported, else `reference`.
        dtype: of the maps, torch.int64 or torch.int32.
        check: what becomes of bad loads on `triton`: `async` counts each as 0 and records it in `Placement.bad`,
            `sync` waits for the GPU and raises. The other backends always raise.
        out: `triton` only: tensors to fill, in place of new ones; their dtype counts. The Placement holds them.
        workspace: `triton` only: scratch to use. With `out` and `workspace` nothing is allocated on the GPU.

    Returns:
        A valid Placement on the device of `weight`, the same bits on every backend, device and machine. Ties anywhere
        go to the lowest index.

    Raises:
        TypeError: `weight` is no tensor.
        ValueError: `weight` is not 2-D, is complex or boolean, has no experts, or holds a load that is NaN, negative or
            above 2**100 (see `check`); the topology does not fit it; the policy or backend is unknown, or the backend
            cannot take the shape, the device, or an argument.
        ImportError: the backend asked for needs a package that cannot be imported.
    """
    chosen = resolve_policy(policy)
    _check_shape(weight)
    topology.check_experts(weight.shape[1])
    if dtype not in (torch.int64, torch.int32):
        raise ValueError(f"dtype={dtype} must be torch.int64 or torch.int32")
    if check not in ("async", "sync"):
        raise ValueError(f"check={check!r} must be 'async' or 'sync'")
    backend = resolve_backend(backend, weight.device)
    if backend == "triton":
        return _plan_on_gpu(weight, topology, chosen, dtype, check, out, workspace)
    if out is not None or workspace is not None:
        raise ValueError(f"out and workspace go with backend='triton'; this plan is made by {backend!r}")
    phy2log, phyrank, logcnt = _host_backend(backend)(_float32_loads(weight), topology, chosen)
    if (weight.device.type, dtype) != ("cpu", torch.int64):
        phy2log, phyrank, logcnt = (slots.to(weight.device, dtype) for slots in (phy2log, phyrank, logcnt))
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
    """DeepSeek's EPLB entry point, same arguments, same results: unlike `plan`, it uses DeepSeek's policy by default.

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
    placement = plan(
        weight,
        Topology(num_replicas=num_replicas, num_gpus=num_gpus, num_groups=num_groups, num_nodes=num_nodes),
        policy=policy,
        backend=backend,
    )
    return placement.phy2log, placement.log2phy, placement.logcnt


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that plans loads on `device` when `backend` is asked for: never `auto`.

    Raises:
        ValueError: no backend has that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if device.type == "cuda" and _imports("triton"):  # PyTorch calls AMD's GPUs cuda too
        return "triton"
    return "cpu" if _imports("numba") else "reference"


@cache
def _imports(package: str) -> bool:
    """Whether `package` can be imported: one that is there may still refuse its NumPy, say."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True


@cache
def _host_backend(name: str) -> _PlanLayers:
    """plan_layers of a backend that plans float32 loads on the CPU; imported when first asked for."""
    module = {"cpu": "eplb_triton.cpu", "reference": "eplb_reference"}[name]
    plan_layers: _PlanLayers = import_module(module).plan_layers
    return plan_layers


def _plan_on_gpu(
    weight: Tensor,
    topology: Topology,
    policy: Policy,
    dtype: torch.dtype,
    check: str,
    out: Outputs | None,
    workspace: Workspace | None,
) -> Placement:
    from eplb_triton.kernels.launcher import first_bad_load, launch  # noqa: PLC0415 - Triton is not everywhere

    maps = launch(weight.detach(), topology, policy, out=out, workspace=workspace, dtype=dtype)
    if check == "sync" and (bad := first_bad_load(maps.bad)) is not None:
        raise _bad_load(weight, *bad)
    placement = Placement(maps.phy2log, maps.phyrank, maps.logcnt, topology, policy.name, maps.bad)
    if maps.log2phy is not None:
        vars(placement)["log2phy"] = maps.log2phy  # where the property would keep what it builds
    return placement


def _check_shape(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, must be a torch.Tensor [layers, experts]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be 2-D: [layers, experts]")
    if weight.dtype == torch.bool or weight.is_complex():
        raise ValueError(f"weight has dtype {weight.dtype}, must be real or integer")


def _float32_loads(weight: Tensor) -> Tensor:
    """`weight` on the CPU, each load rounded once to float32, -0 made 0, every one of them usable."""
    given = weight.detach().to("cpu", torch.float32).numpy()
    loads = np.add(given, np.float32(0), order="C")  # by NumPy, whose small calls take a third of PyTorch's time
    if loads.size and not (loads.min() >= 0 and loads.max() <= MAX_LOAD):  # both are NaN if any load is
        layer, expert = np.argwhere(~((loads >= 0) & (loads <= MAX_LOAD)))[0].tolist()
        raise _bad_load(weight, layer, expert)
    return torch.from_numpy(loads)


def _bad_load(weight: Tensor, layer: int, expert: int) -> ValueError:
    return ValueError(
        f"weight[{layer}, {expert}]={weight[layer, expert].item()!r} must be a finite load of at least 0 and at "
        "most 2**100; it is the first that is not"
    )
