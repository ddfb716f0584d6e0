"""Dispatch: which replica of its expert each token goes to.

Every function takes a placement as plain tensors, on the device where it works: `triton` on a GPU, on the current
stream, without waiting; `cpu` (Numba) and `reference` on the CPU. All backends return the same integers. A *place* of
an expert is a slot of it on a GPU that holds no lower slot of it; only places get tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from eplb_triton.backends import resolve_backend
from eplb_triton.serving import host
from eplb_triton.serving.checks import INDEX_TYPES, check, check_counts, check_placement, output
from eplb_triton.serving.rank_map import dispatch_map
from eplb_triton.serving.share_bound import split_bound
from eplb_triton.topology import Topology

__all__ = [
    "classify",
    "dispatch_map",
    "slots_of",
    "slots_workspace",
    "split",
    "split_bound",
    "split_workspace",
    "table",
]


def classify(
    phy2log: Tensor, num_experts: int, topology: Topology, *, backend: str = "auto", out: Tensor | None = None
) -> Tensor:
    """The class of every expert: experts of one class share no GPU, so that `split` levels them side by side.

    Args:
        phy2log: [L, P] int64 or int32, expert in each slot, -1 where there is none.
        num_experts: E.
        topology: P and D; slot k is on GPU k // (P / D).
        backend: `auto`, `triton`, `cpu` or `reference`.
        out: [L, E] int32 to fill, in place of a new tensor.

    Returns:
        [L, E] int32, -1 for an expert of one place or none. In index order, each takes the lowest class none of whose
        experts uses one of its GPUs. It depends on the placement alone: whatever changes that must do this anew.

    Raises:
        ValueError: a shape, type or device is another, or the backend is unknown.
    """
    backend = resolve_backend(backend, phy2log.device)
    check_placement(phy2log, topology)
    classes = output("out", out, (phy2log.shape[0], num_experts), torch.int32, phy2log.device)
    if backend == "triton":
        _on_gpu().classify(phy2log, topology.num_gpus, classes)
    else:
        host.classify(backend, phy2log, topology.num_gpus, classes)
    return classes


def split(
    counts: Tensor,
    phy2log: Tensor,
    classes: Tensor,
    topology: Topology,
    *,
    rounds: int = 8,
    rank: int | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    offsets: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Quotas: how many of its expert's tokens each slot gets, so that the busiest GPU has as few as can be.

    Args:
        counts: [L, E] tokens of each expert, integers, or loads in float (then quotas are in units of a power of two
            of each layer, so that they add up to less than 2**24); or [ranks, L, E] integers, tokens on each rank.
            A layer's sum must be below 2**31: checked on the CPU, the caller's promise on a GPU, where a bad float
            load counts as 0.
        phy2log: [L, P] int64 or int32, expert in each slot, -1 where there is none.
        classes: [L, E] int32, from `classify`.
        topology: P and D.
        rounds: how often every expert is levelled; 0 is an even split, 8 are within 0.3 % of the optimum.
        rank: whose offsets to write, with counts of all ranks.
        backend: `auto`, `triton`, `cpu` or `reference`.
        out: [L, P] int32 to fill, in place of a new tensor.
        offsets: [L, E] int32 to fill with the tokens of each expert on the ranks below `rank`, for `slots_of`.
        workspace: `triton` only: scratch from `split_workspace`. With it and `out` nothing is allocated.

    Returns:
        [L, P] int32: over the slots of an expert they sum to its tokens; 0 where a slot is no place. No GPU load is
        above the largest of an even split. Ties: lowest slot.

    Raises:
        ValueError: a shape, type or device is another; a count is negative or not finite, a sum 2**31 or more, or an
            expert with tokens has no place (on the CPU); the backend is unknown.
    """
    backend = resolve_backend(backend, counts.device)
    check_placement(phy2log, topology)
    num_layers, num_experts = classes.shape[0], classes.shape[-1]
    check("classes", classes, (phy2log.shape[0], num_experts), (torch.int32,), phy2log.device)
    check_counts(counts, (num_layers, num_experts), phy2log.device, rank, offsets)
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must be at least 0; 0 is an even split")
    quotas = output("out", out, tuple(phy2log.shape), torch.int32, phy2log.device)
    if offsets is not None:
        check("offsets", offsets, (num_layers, num_experts), (torch.int32,), phy2log.device)
    if backend == "triton":
        scratch = output(
            "workspace", workspace, _split_scratch(num_layers, num_experts, topology), torch.int32, phy2log.device
        )
        _on_gpu().split(phy2log, classes, counts, topology.num_gpus, rounds, rank or 0, quotas, offsets, scratch)
        return quotas
    if workspace is not None:
        raise ValueError(f"workspace goes with backend='triton'; these quotas are made by {backend!r}")
    if offsets is not None:
        offsets.copy_(counts[:rank].sum(0))
        counts = counts.sum(0)
    host.split(backend, counts, phy2log, classes, topology.num_gpus, rounds, quotas)
    return quotas


def split_workspace(num_layers: int, num_experts: int, topology: Topology, device: torch.device | str) -> Tensor:
    """Scratch for `split` on a GPU: [L, ...] int32; two splits at a time need one each."""
    shape = _split_scratch(num_layers, num_experts, topology)
    return torch.empty(shape, dtype=torch.int32, device=device)


def slots_of(
    topk_ids: Tensor,
    layer: int,
    quotas: Tensor,
    phy2log: Tensor,
    num_experts: int,
    topology: Topology,
    *,
    offsets: Tensor | None = None,
    salt: int | Tensor = 0,
    backend: str = "auto",
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """The physical slot that each token of this rank goes to.

    Args:
        topk_ids: [tokens, k] int64 or int32, experts that the gate chose, -1 for none.
        layer: its index in `quotas` and `phy2log`.
        quotas: [L, P] int32, from `split`.
        phy2log: [L, P] int64 or int32.
        num_experts: E.
        topology: P and D.
        offsets: [L, E] int32, tokens of each expert on lower ranks, in this very step: then the g-th token of an
            expert, over all ranks and in each in the order of `topk_ids`, row by row, goes to the first place, in slot
            order, whose cumulative quota exceeds g, and every slot gets exactly its quota. One beyond all quotas goes
            to the last place that has any. None: a hash of (row, layer, salt) chooses in proportion to the quotas, of
            this step or an earlier one; all ids of a row by one hash. Quotas of an expert that are all 0 count as 1.
        salt: of the hash, from rank and step; a tensor [1] int32 on the device may change between replays of a graph.
        backend: `auto`, `triton`, `cpu` or `reference`.
        out: [tokens, k], of the type of `topk_ids`, to fill in place of a new tensor.
        workspace: `triton` with offsets only: scratch from `slots_workspace`. With it and `out` nothing is allocated.

    Returns:
        [tokens, k], of the type of `topk_ids`; -1 for an id of -1, and for an expert without a place.

    Raises:
        ValueError: a shape, type or device is another; an id is outside -1 … E - 1 (on the CPU; on a GPU it counts as
            -1); the backend is unknown.
    """
    backend = resolve_backend(backend, topk_ids.device)
    check_placement(phy2log, topology)
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids has shape {tuple(topk_ids.shape)}, must be [tokens, k]")
    check("topk_ids", topk_ids, tuple(topk_ids.shape), INDEX_TYPES, phy2log.device)
    check("quotas", quotas, tuple(phy2log.shape), (torch.int32,), phy2log.device)
    if offsets is not None:
        check("offsets", offsets, (phy2log.shape[0], num_experts), (torch.int32,), phy2log.device)
    if not 0 <= layer < phy2log.shape[0]:
        raise ValueError(f"layer={layer} must be 0 to {phy2log.shape[0] - 1}, as phy2log has {phy2log.shape[0]} layers")
    slots = output("out", out, tuple(topk_ids.shape), topk_ids.dtype, topk_ids.device)
    if backend == "triton":
        _on_gpu().route(
            topk_ids, layer, quotas, phy2log, num_experts, topology.num_gpus, offsets, salt, slots, workspace
        )
        return slots
    if workspace is not None:
        raise ValueError(f"workspace goes with backend='triton'; these slots are found by {backend!r}")
    numbers = num_experts, topology.num_gpus
    host.route(backend, topk_ids, layer, quotas, phy2log, *numbers, offsets, salt, slots)
    return slots


def slots_workspace(num_ids: int, num_experts: int, device: torch.device | str) -> Tensor:
    """Scratch for `slots_of` with offsets on a GPU, for up to `num_ids` = tokens * k: [chunks, E] int32."""
    return torch.empty(_on_gpu().chunks(num_ids), num_experts, dtype=torch.int32, device=device)


def table(
    quotas: Tensor,
    width: int,
    phy2log: Tensor,
    num_experts: int,
    topology: Topology,
    *,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """A log2phy whose entries repeat in proportion to the quotas, for frameworks that choose one of `width` evenly.

    Args:
        quotas: [L, P] int32, from `split` on the loads of the last steps.
        width: M, entries of an expert.
        phy2log: [L, P] int64 or int32.
        num_experts: E.
        topology: P and D.
        backend: `auto`, `triton`, `cpu` or `reference`.
        out: [L, E, M], of the type of phy2log, to fill in place of a new tensor.

    Returns:
        [L, E, M], of the type of phy2log: slots in ascending order, each as often as the largest remainder of
        quota * M / sum says, ties lowest slot; all places alike where the sum is 0; -1 without a place.

    Raises:
        ValueError: a shape, type or device is another, `width` is not 1 to 32,768, or the backend is unknown.
    """
    backend = resolve_backend(backend, quotas.device)
    check_placement(phy2log, topology)
    check("quotas", quotas, tuple(phy2log.shape), (torch.int32,), phy2log.device)
    if not 1 <= width <= 32768:
        raise ValueError(f"width={width} must be 1 to 32768; 16 tell 6 % of a share, 64 tell 2 %")
    shape = (phy2log.shape[0], num_experts, width)
    entries = output("out", out, shape, phy2log.dtype, phy2log.device)
    if backend == "triton":
        _on_gpu().tabulate(phy2log, quotas, topology.num_gpus, entries)
    else:
        host.tabulate(backend, phy2log, quotas, topology.num_gpus, entries)
    return entries


def _on_gpu() -> Any:
    return import_module("eplb_triton.kernels.serve_launch")


def _split_scratch(num_layers: int, num_experts: int, topology: Topology) -> tuple[int, int]:
    return num_layers, 3 * num_experts + 17 * topology.num_replicas  # SplitScratch of kernels/splitting_levels.py
