"""The tensors of a placement: new ones, and those of an engine, checked once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eplb_triton.checks import check_map
from eplb_triton.status import GOOD
from eplb_triton.topology import Topology

if TYPE_CHECKING:
    from eplb_triton.placement import Placement

_WORDS = {
    "phy2log": "[layers, replicas]",
    "phyrank": "[layers, replicas]",
    "logcnt": "[layers, experts]",
    "log2phy": "[layers, experts, width]",
}
ALIGNMENT = 16  # bytes: what a kernel is compiled for


def check_map_dtype(dtype: torch.dtype) -> None:
    """Refuse what no map is made of.

    Raises:
        ValueError: `dtype` is neither torch.int64 nor torch.int32.
    """
    if dtype not in (torch.int64, torch.int32):
        raise ValueError(f"dtype={dtype} must be torch.int64 or torch.int32")


def new_buffers(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """New tensors of `shapes`, by name, that hold no expert yet: -1 everywhere, and counts of 0.

    Raises:
        ValueError: `dtype` is none of maps.
    """
    check_map_dtype(dtype)
    made = {}
    for name, shape in shapes.items():
        fill, kind = (GOOD, torch.int32) if name in ("bad", "classes") else (0 if name == "logcnt" else -1, dtype)
        made[name] = torch.full(shape, fill, dtype=kind, device=device)
    return made


def check_buffers(
    topology: Topology, phy2log: Tensor, logcnt: Tensor, phyrank: Tensor | None, log2phy: Tensor | None
) -> tuple[int, int]:
    """Refuse tensors that a planner cannot fill: see `Placement.over`. Reads none of their elements.

    Returns:
        L and E.

    Raises:
        TypeError: one is no tensor.
        ValueError: one has another shape, dtype, device, layout or alignment than it must; the message names it.
    """
    check_map("phy2log", phy2log, "[layers, replicas]")
    check_map("logcnt", logcnt, "[layers, experts]")
    layers, experts = logcnt.shape
    topology.check_experts(experts)
    shapes = topology.map_shapes(layers, experts, log2phy=False)
    for name, tensor in (("phy2log", phy2log), ("phyrank", phyrank), ("logcnt", logcnt)):
        if tensor is None:
            continue
        check_map(name, tensor, _WORDS[name])
        _check_shape(name, tensor, shapes[name])
        _check_kind(name, tensor, phy2log)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
    if log2phy is not None:
        check_map("log2phy", log2phy, _WORDS["log2phy"])
        width = log2phy.shape[2]
        _check_shape("log2phy", log2phy, (layers, experts, max(width, 1)))
        _check_kind("log2phy", log2phy, phy2log)
        if log2phy.stride(2) != 1 and width > 1:
            raise ValueError(f"log2phy has strides {log2phy.stride()}, must have entries of an expert side by side")
    return layers, experts


def copy_maps(mine: Placement, other: Placement) -> None:
    """Copy all tensors of `other`, checked to fit, into those of `mine`, in stream order."""
    if mine.log2phy is not None and other.log2phy is not None:
        width = other.log2phy.shape[2]
        mine.log2phy[..., :width].copy_(other.log2phy, non_blocking=True)
        mine.log2phy[..., width:].fill_(-1)
    for name in ("phy2log", "phyrank", "logcnt", "bad", "classes"):
        ours, theirs = getattr(mine, name), getattr(other, name)
        if ours is not None and theirs is not None:
            ours.copy_(theirs, non_blocking=True)
    for ours, theirs in zip(mine.changes or (), other.changes or (), strict=False):
        ours.copy_(theirs, non_blocking=True)


def overlap(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors may share memory: from the first to the last byte that each reaches."""
    if other is None or one.device != other.device or not one.numel() or not other.numel():
        return False
    (first, last), (start, end) = _reach(one), _reach(other)
    return first < end and start < last


def _reach(tensor: Tensor) -> tuple[int, int]:
    furthest = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (furthest + 1) * tensor.element_size()


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")


def _check_kind(name: str, tensor: Tensor, like: Tensor) -> None:
    if (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, must be {like.dtype} on {like.device} like phy2log"
        )
    if tensor.numel() and tensor.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{name} begins at address {tensor.data_ptr():#x}, must begin at a multiple of {ALIGNMENT}: as new tensors "
            "and whole layers of them do"
        )
