"""Checks and buffers that the functions of dispatch.py share."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.topology import Topology

INDEX_TYPES = (torch.int64, torch.int32)
MOST_TOKENS = 2**31 - 1  # of a layer: loads of GPUs and sums of them are int32
MOST_LOAD = 2.0**100


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse a tensor that a backend could not take as it is: shape, type, device, contiguous.

    Raises:
        ValueError: says which.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be {' or '.join(map(str, dtypes))}; use .to()")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}, where the other tensors are")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous; use .contiguous()")


def output(name: str, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`given`, checked, or a new tensor."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check(name, given, shape, (dtype,), device)
    return given


def check_placement(phy2log: Tensor, topology: Topology) -> None:
    """Refuse what is no [L, P] map of `topology`."""
    if phy2log.dim() != 2 or phy2log.shape[1] != topology.num_replicas:
        raise ValueError(
            f"phy2log has shape {tuple(phy2log.shape)}, must be [layers, num_replicas={topology.num_replicas}]"
        )
    check("phy2log", phy2log, tuple(phy2log.shape), INDEX_TYPES, phy2log.device)


def gpus_of_node(topology: Topology) -> int:
    """D / N, however planning is; D, one node, where N does not divide D."""
    gpus, nodes = topology.num_gpus, topology.num_nodes
    return gpus // nodes if gpus % nodes == 0 else gpus


def check_counts(
    counts: Tensor, shape: tuple[int, int], device: torch.device, rank: int | None, offsets: Tensor | None
) -> None:
    """Refuse counts that are neither [L, E] nor integers [ranks, L, E] with a rank, and a rank without offsets."""
    if (rank is None) != (offsets is None):
        raise ValueError(f"rank={rank} and offsets go together: the offsets of a rank are written into `offsets`")
    if counts.dtype == torch.bool or counts.is_complex():
        raise ValueError(f"counts has dtype {counts.dtype}, must be integers or floating")
    if counts.dim() == 3:
        if counts.is_floating_point():
            raise ValueError(
                f"counts has dtype {counts.dtype}, must be integers if it is [ranks, L, E]; sum loads first"
            )
        if rank is None or not 0 <= rank < counts.shape[0]:
            raise ValueError(
                f"rank={rank} must be 0 to {counts.shape[0] - 1} with counts of {counts.shape[0]} ranks; "
                "without offsets pass counts.sum(0)"
            )
        check("counts", counts, (counts.shape[0], *shape), (counts.dtype,), device)
    elif rank is not None:
        raise ValueError(f"rank={rank} needs counts [ranks, L, E], not {tuple(counts.shape)}")
    else:
        check("counts", counts, shape, (counts.dtype,), device)


def checked_counts(counts: Tensor) -> Tensor:
    """Counts [L, E] on the CPU as int64, or as float32 loads; each of them usable, and so their sums.

    Raises:
        ValueError: names the first that is not.
    """
    loads = counts.to(torch.float32) if counts.is_floating_point() else counts.to(torch.int64)
    good = (loads >= 0) & (loads <= (MOST_LOAD if loads.is_floating_point() else MOST_TOKENS))  # false for NaN
    if not bool(good.all()):
        layer, expert = (~good).nonzero()[0].tolist()
        most = "2**100" if loads.is_floating_point() else str(MOST_TOKENS)
        raise ValueError(
            f"counts[{layer}, {expert}]={counts[layer, expert].item()!r} must be at least 0 and at most {most}; "
            "it is the first that is not"
        )
    if not loads.is_floating_point() and bool((loads.sum(1) > MOST_TOKENS).any()):
        layer = int((loads.sum(1) > MOST_TOKENS).nonzero()[0])
        raise ValueError(
            f"counts[{layer}] sums to {int(loads[layer].sum())}, must be at most {MOST_TOKENS}; "
            "pass floating loads, which are scaled"
        )
    return loads.contiguous()
