"""The loads of the last steps, counted where the gates choose: on the device, without the host."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, distributed

from eplb_triton.backends import resolve_backend
from eplb_triton.serving.checks import INDEX_TYPES, MOST_TOKENS, check


class HasSlots(Protocol):
    """A placement, as far as `LoadWindow` looks at it."""

    @property
    def phy2log(self) -> Tensor:
        """[L, P] int64 or int32, expert in each slot, -1 where there is none."""


class LoadWindow:
    """A ring of n steps of counts [L, E], int32, and the step that is now.

    Adding allocates nothing, waits for nothing and may be captured in a CUDA graph: a graph replayed after the ids have
    changed counts the new ids, and `advance` moves on a position that is kept on the device. Integer atomics: the order
    of additions makes no difference. A count that leaves int32 is told by `raise_if_bad`, and at once on the CPU.

    Args:
        num_steps: n.
        num_layers: L.
        num_experts: E.
        device: where the counts are kept.
        backend: `auto`, `triton`, `cpu` or `reference`; of the last two both are PyTorch's own bincount.

    Raises:
        ValueError: a size is below 1, or the backend is unknown.
    """

    def __init__(
        self,
        num_steps: int,
        num_layers: int,
        num_experts: int,
        device: torch.device | str = "cpu",
        *,
        backend: str = "auto",
    ) -> None:
        for name, size in (("num_steps", num_steps), ("num_layers", num_layers), ("num_experts", num_experts)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self._backend = resolve_backend(backend, torch.device(device))
        self.ring = torch.zeros(num_steps, num_layers, num_experts, dtype=torch.int32, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._bad = torch.zeros(1, dtype=torch.int32, device=device)
        self._steps = torch.arange(1, num_steps + 1, device=device)

    def add(self, layer: int, topk_ids: Tensor) -> None:
        """Count the experts that a gate chose, in the step that is now.

        Args:
            layer: 0 to L - 1.
            topk_ids: [tokens, k] int64 or int32, on the device of the window; an id of no expert, as -1, is left out.

        Raises:
            ValueError: the layer is none, the ids have another type or device, or (on the CPU) a count leaves int32.
        """
        _, num_layers, num_experts = self.ring.shape
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer={layer} must be 0 to {num_layers - 1}")
        check("topk_ids", topk_ids, tuple(topk_ids.shape), INDEX_TYPES, self.ring.device)
        if self._backend == "triton":
            launch = import_module("eplb_triton.kernels.serve_launch")
            launch.add_ids(topk_ids, layer, self.ring, self._position, self._bad)
            return
        ids = topk_ids.flatten().long()
        counts = torch.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)
        self._add(slice(layer, layer + 1), counts.unsqueeze(0))

    def add_counts(self, counts: Tensor, placement: HasSlots) -> None:
        """Add tokens of physical slots to their experts, in the step that is now.

        Args:
            counts: [L, P] integers, at least 0, below 2**31, tokens that each slot got.
            placement: whose slots they are; what a slot of -1 got is left out.

        Raises:
            ValueError: the shapes do not fit, or (on the CPU) a count is negative or leaves int32.
        """
        phy2log, num_layers = placement.phy2log, self.ring.shape[1]
        check("phy2log", phy2log, (num_layers, phy2log.shape[-1]), INDEX_TYPES, self.ring.device)
        check("counts", counts, tuple(phy2log.shape), INDEX_TYPES, self.ring.device)
        if self._backend == "triton":
            launch = import_module("eplb_triton.kernels.serve_launch")
            launch.add_slots(counts, phy2log, self.ring, self._position, self._bad)
            return
        if bool((counts < 0).any()):
            layer, slot = (counts < 0).nonzero()[0].tolist()
            raise ValueError(f"counts[{layer}, {slot}]={int(counts[layer, slot])} must be at least 0")
        held = phy2log >= 0
        total = torch.zeros(num_layers, self.ring.shape[2], dtype=torch.int64, device=self.ring.device)
        total.scatter_add_(1, phy2log.long().clamp(min=0), counts.long() * held)
        self._add(slice(None), total)

    def advance(self) -> None:
        """Begin a step: the oldest is forgotten, and counts of the new one are 0. Waits for nothing."""
        self._position.add_(1).remainder_(self.ring.shape[0])
        self.ring.index_fill_(0, self._position, 0)

    @property
    def history(self) -> Tensor:
        """[n, L, E] int32, a new tensor: the steps, oldest first, that is now last; 0 where there was none yet."""
        return self.ring.index_select(0, (self._position + self._steps).remainder_(self.ring.shape[0]))

    @property
    def loads(self) -> Tensor:
        """[L, E] int64, a new tensor: the sum of all steps."""
        return self.ring.sum(0)

    def reduce(self, group: distributed.ProcessGroup | None = None) -> Tensor:
        """[n, L, E] int64, a new tensor: `history` summed over the ranks of a torch.distributed group, on all of them.

        Args:
            group: of ranks whose windows have one shape and advance together; None: all.
        """
        history = self.history.to(torch.int64)  # sums of ranks may leave int32
        distributed.all_reduce(history, group=group)
        return history

    def raise_if_bad(self) -> None:
        """Wait for the device, and tell whether a count has left int32 since the window was made.

        Raises:
            OverflowError: it has; the counts of that step are wrong.
        """
        if int(self._bad) != 0:
            raise OverflowError(f"more than {MOST_TOKENS} tokens of one expert in a step; call advance() at every step")

    def _add(self, layers: slice, counts: Tensor) -> None:
        now = self.ring[int(self._position), layers]
        total = now + counts
        if bool((total > MOST_TOKENS).any()):
            self._bad.fill_(1)
            self.raise_if_bad()
        now.copy_(total)
