"""Transfers: what a placement must fetch to come from the one in force, from where, and in which batch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from eplb_triton.backends import resolve_backend
from eplb_triton.serving import host
from eplb_triton.serving.checks import check, check_placement, gpus_of_node, output
from eplb_triton.topology import Topology

COUNTS = ("copied", "fetched", "from_afar", "missing", "batches")
"""Columns of `Transfers.counts`."""


@dataclass(frozen=True, eq=False)
class Transfers:
    """Where each slot of a placement is filled from, in slots of the placement in force.

    Args:
        source: [L, P] int32, slot to read; the slot itself where it is kept or is to hold none; -1 (missing) where no
            slot in force holds its expert.
        batch: [L, P] int32, in which batch of its layer a slot comes from another GPU; no GPU takes part in more than
            one transfer of a batch. -1 where nothing comes: kept, copied within the GPU, or missing.
        counts: [L, 5] int32, by layer: slots copied within their GPU; fetched from another; of these, from another
            node; missing; and batches.
    """

    source: Tensor
    batch: Tensor
    counts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """source, batch and counts."""
        return self.source, self.batch, self.counts

    @classmethod
    def empty(cls, num_layers: int, num_replicas: int, device: torch.device | str = "cpu") -> Transfers:
        """Tensors to be filled, as `out`."""
        shapes = ((num_layers, num_replicas), (num_layers, num_replicas), (num_layers, len(COUNTS)))
        return cls(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))

    def of(self, layer: int) -> Transfers:
        """Those of one layer: views [1, ...] of the same memory."""
        return Transfers(*(tensor.narrow(0, layer, 1) for tensor in self.tensors))

    def total(self) -> dict[str, int]:
        """Each of the counts by its name, of all layers together; the batches of all layers one after the other. Waits
        for a GPU."""
        return dict(zip(COUNTS, self.counts.sum(0).tolist(), strict=True))

    def raise_if_missing(self) -> None:
        """Refuse transfers that leave a slot without its expert. Waits for a GPU.

        Raises:
            ValueError: names the first layer and slot whose expert no slot in force holds.
        """
        missing = (self.source < 0).nonzero()
        if len(missing):
            layer, slot = missing[0].tolist()
            raise ValueError(
                f"layer {layer}, slot {slot}: no slot of the placement in force holds its expert, the first of "
                f"{len(missing)} slots; load their weights from where they were first loaded from"
            )


def list_transfers(
    ahead: Tensor,
    live: Tensor,
    num_experts: int,
    topology: Topology,
    *,
    backend: str = "auto",
    out: Transfers | None = None,
) -> Transfers:
    """From which slot of `live` each slot of `ahead` is filled, and in which batch.

    Args:
        ahead: [L, P] int64 or int32, expert in each slot of the placement to come, -1 where there is none.
        live: [L, P], as ahead and of its type and device: the placement in force.
        num_experts: E.
        topology: P, D, and N nodes of D / N GPUs; where N does not divide D, one node.
        backend: `auto`, `triton`, `cpu` or `reference`.
        out: to fill, in place of new tensors; then on a GPU nothing is allocated.

    Returns:
        Transfers; slots are looked at in ascending order. The source is on the GPU of the slot, which is a copy; else
        on its node; else anywhere: at both of these the replica whose GPU has sent least so far in the layer, ties
        lowest slot. The batch is the lowest in which neither GPU takes part in another transfer.

    Raises:
        ValueError: a shape, type or device is another, or the backend is unknown; on the CPU, a slot names no expert
            and is not -1 (on a GPU it counts as -1).
    """
    backend = resolve_backend(backend, ahead.device)
    check_placement(ahead, topology)
    check("live", live, tuple(ahead.shape), (ahead.dtype,), ahead.device)
    sizes = num_experts, topology.num_gpus, gpus_of_node(topology)
    if out is None:
        out = Transfers.empty(ahead.shape[0], ahead.shape[1], ahead.device)
    shapes = (*ahead.shape,), (*ahead.shape,), (len(ahead), len(COUNTS))
    for name, given, shape in zip(("source", "batch", "counts"), out.tensors, shapes, strict=True):
        output(f"out.{name}", given, shape, torch.int32, ahead.device)
    if backend == "triton":
        launch: Any = import_module("eplb_triton.kernels.serve_launch")
        launch.transfer(ahead, live, *sizes, out.tensors)
        return out
    host.transfer(backend, ahead, live, *sizes, out.tensors)
    return out
