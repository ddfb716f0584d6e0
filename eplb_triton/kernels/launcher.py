# mypy: disable-error-code="import-untyped"
"""The launcher: checks, new outputs where none are given, and the launch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from eplb_triton.kernels.fused import plan_rows
from eplb_triton.kernels.specs import TRITON_TYPE, LaunchPlan, Workspace, launch_plan
from eplb_triton.policy import Policy
from eplb_triton.topology import Topology

_INTERPRETED = not isinstance(plan_rows, triton.runtime.JITFunction)


class Outputs(NamedTuple):
    """What a launch fills, on the device of the loads.

    phy2log [L, P], phyrank [L, P], logcnt [L, E], log2phy [L, E, P - E + 1] or None, all of one integer type;
    bad [L, N] int32: lowest logical expert of the row whose load was bad (and counted as 0), else -1.
    """

    phy2log: Tensor
    phyrank: Tensor
    logcnt: Tensor
    log2phy: Tensor | None
    bad: Tensor


def launch(
    weight: Tensor,
    topology: Topology,
    policy: Policy,
    *,
    out: Outputs | None = None,
    workspace: Workspace | None = None,
    dtype: torch.dtype = torch.int64,
    want_log2phy: bool = False,
) -> Outputs:
    """Plan every layer on the current stream, without waiting for it.

    Args:
        weight: [L, E] loads on a GPU, tokens per expert, real or integer, any strides.
        topology: counts of the cluster.
        policy: the choice at each stage.
        out: tensors to fill, contiguous, as `Outputs` says; with `workspace` nothing is allocated.
        workspace: scratch, from `launch_plan(...).workspace(...)`.
        dtype: of new outputs, torch.int64 or torch.int32; with `out`, that of its tensors counts.
        want_log2phy: whether to fill log2phy as well; with `out`, whether it is there counts.

    Returns:
        `out`, or new tensors.

    Raises:
        ValueError: an argument is none the kernels take.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [layers, experts]")
    if weight.dtype not in TRITON_TYPE:
        weight = _as_float32(weight)
    if not weight.is_cuda and not _INTERPRETED:
        raise ValueError(f"weight is on {weight.device}, must be on a GPU for backend 'triton'; use weight.cuda()")
    num_layers, num_experts = weight.shape
    if out is not None:
        dtype, want_log2phy = out.phy2log.dtype, out.log2phy is not None
    plan = launch_plan(
        topology,
        num_experts,
        policy,
        weight_dtype=weight.dtype,
        dtype=dtype,
        want_log2phy=want_log2phy,
        lanes=_LANES,
    )
    if out is None:
        out = _new_outputs(weight, topology, plan, dtype, want_log2phy)
    else:
        _check_out(out, weight, topology, plan)
    if num_layers == 0:
        return out
    if workspace is None:
        workspace = plan.workspace(num_layers, weight.device)
    else:
        _check_workspace(workspace, weight, plan)
    partitions = _on_device(plan.partitions, weight.device)
    if weight.is_cuda and weight.get_device() != torch.cuda.current_device():
        with torch.cuda.device(weight.get_device()):
            _run(plan, weight, out, workspace, partitions)
    else:
        _run(plan, weight, out, workspace, partitions)
    return out


def first_bad_load(bad: Tensor) -> tuple[int, int] | None:
    """(layer, expert) of the first bad load that `Outputs.bad` [L, N] records, or None. Waits for the device."""
    by_layer = bad.cpu()
    layers = (by_layer >= 0).any(1).nonzero()
    if not len(layers):
        return None
    layer = int(layers[0])
    return layer, int(by_layer[layer][by_layer[layer] >= 0].min())


_LANES = 64 if torch.version.hip else 32


@lru_cache(maxsize=64)
def _on_device(partitions: Tensor, device: torch.device) -> Tensor:
    """Copied once, at the first launch of a plan: like compiling, not possible while a CUDA graph is captured."""
    return partitions.to(device)


def _run(plan: LaunchPlan, weight: Tensor, out: Outputs, workspace: Workspace, partitions: Tensor) -> None:
    num_layers = weight.shape[0]
    inputs = (weight, weight.stride(0), weight.stride(1), num_layers * plan.num_nodes, *workspace, partitions)
    grid = plan.grid(num_layers)
    for kernel in plan.kernels:
        tensors = inputs + tuple(out) if kernel.function is plan_rows else inputs
        kernel.function[grid](*tensors, **kernel.keywords)


def _new_outputs(
    weight: Tensor, topology: Topology, plan: LaunchPlan, dtype: torch.dtype, want_log2phy: bool
) -> Outputs:
    shapes = _output_shapes(weight, topology, plan)
    device = weight.device
    return Outputs(
        torch.empty(shapes["phy2log"], dtype=dtype, device=device),
        torch.empty(shapes["phyrank"], dtype=dtype, device=device),
        torch.empty(shapes["logcnt"], dtype=dtype, device=device),
        torch.empty(shapes["log2phy"], dtype=dtype, device=device) if want_log2phy else None,
        torch.empty(shapes["bad"], dtype=torch.int32, device=device),
    )


def _output_shapes(weight: Tensor, topology: Topology, plan: LaunchPlan) -> dict[str, tuple[int, ...]]:
    num_layers, num_experts = weight.shape
    num_replicas = topology.num_replicas
    return {
        "phy2log": (num_layers, num_replicas),
        "phyrank": (num_layers, num_replicas),
        "logcnt": (num_layers, num_experts),
        "log2phy": (num_layers, num_experts, num_replicas - num_experts + 1),
        "bad": (num_layers, plan.num_nodes),
    }


def _check_out(out: Outputs, weight: Tensor, topology: Topology, plan: LaunchPlan) -> None:
    shapes = _output_shapes(weight, topology, plan)
    for name, tensor in out._asdict().items():
        if tensor is not None:
            dtype = torch.int32 if name == "bad" else out.phy2log.dtype
            _check_tensor(f"out.{name}", tensor, shapes[name], dtype, weight.device)


def _check_workspace(workspace: Workspace, weight: Tensor, plan: LaunchPlan) -> None:
    needed = plan.workspace_shapes(weight.shape[0])
    for name, tensor, (shape, dtype) in zip(Workspace._fields, workspace, needed, strict=True):
        _check_tensor(f"workspace.{name}", tensor, shape, dtype, weight.device)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}, where weight is")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")


def _as_float32(weight: Tensor) -> Tensor:
    if weight.is_complex() or weight.dtype == torch.bool:
        raise ValueError(f"weight has dtype {weight.dtype}, must be real or integer")
    return weight.to(torch.float32)
