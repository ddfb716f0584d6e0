# mypy: disable-error-code="import-untyped"
"""The launcher of replanning: everything that waits, compiles or allocates is done once, when it is made."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.kernels.replanning import Memory, Outputs, replan_layers
from eplb_triton.kernels.replanning_shapes import ReplanShape, replan_plan
from eplb_triton.kernels.specs import TRITON_TYPE
from eplb_triton.policy import Policy
from eplb_triton.topology import Topology

NO_LIMIT = 0x7FFFFFFF
_INTERPRETED = not isinstance(replan_layers, triton.runtime.JITFunction)


def price_bits(price: float) -> int:
    """The bits of a float64 as int64: Triton takes a Python float for a float32."""
    return int(struct.unpack("<q", struct.pack("<d", price))[0])


class ReplanLaunch:
    """Replanning on a GPU, made once: a call fills tensors that are there, on the current stream, and waits for
    nothing.

    Args:
        topology: counts of the cluster.
        num_layers: L.
        num_experts: E.
        policy: one with `replan`.
        steps: most steps of a history.
        loads_dtype: of the histories.
        dtype: of the maps, torch.int64 or torch.int32.
        want_log2phy: whether log2phy is filled as well.
        device: of all tensors.

    Raises:
        ValueError: an argument is none that the kernel takes.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        policy: Policy,
        *,
        steps: int,
        loads_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.int64,
        want_log2phy: bool = True,
        device: torch.device | str,
    ) -> None:
        if dtype not in (torch.int32, torch.int64):
            raise ValueError(f"dtype={dtype} must be torch.int64 or torch.int32")
        if loads_dtype not in TRITON_TYPE:
            raise ValueError(f"loads_dtype={loads_dtype} must be one of {', '.join(map(str, TRITON_TYPE))}")
        self.device = torch.device(device)
        if self.device.type != "cuda" and not _INTERPRETED:
            raise ValueError(f"device={device} must be a GPU for backend 'triton'")
        warp = 64 if torch.version.hip else 32
        self.plan = replan_plan(topology, num_experts, policy, steps=steps, warp=warp, wide=_INTERPRETED)
        self.steps, self.loads_dtype, self.dtype = steps, loads_dtype, dtype
        self.shapes = output_shapes(topology, num_layers, num_experts, dtype)
        if not want_log2phy:
            del self.shapes["log2phy"]
        self._history_shape = (num_layers, num_experts)
        self.workspace = workspace(self.plan.shape, num_layers, self.device)
        self._partitions = self.plan.partitions.to(self.device)
        if not _INTERPRETED and num_layers:
            self._compile(topology)

    def empty(self) -> Outputs:
        """Tensors for a call to fill."""
        found = {
            name: torch.empty(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in self.shapes.items()
        }
        return Outputs(**{"log2phy": None, **found})

    def __call__(
        self, history: Tensor, *, out: Outputs, previous: Tensor | None, price: float, moves: int | None = None
    ) -> None:
        """Plan every layer for the loads to come.

        Args:
            history: [n, L, E] of `loads_dtype`, tokens per expert of n steps, 1 <= n <= `steps`, oldest first; any
                strides. Bad loads count as 0.
            out: contiguous tensors, as `empty()` makes them.
            previous: [L, P] of `dtype`, contiguous, the placement in force; -1: no expert there. None: nothing is.
            price: what a written slot must save, a part of the mean GPU load.
            moves: a layer writes at most so many slots; None: no limit.

        Raises:
            ValueError: a tensor is none of these; `previous` is `out.phy2log`; a price or a limit below 0.
        """
        self._check(history, out, previous)
        if not 0 <= price < math.inf:
            raise ValueError(f"price={price!r} must be at least 0 and finite")
        if moves is not None and moves < 0:
            raise ValueError(f"moves={moves!r} must be at least 0; None: no limit")
        limit = NO_LIMIT if moves is None else min(moves, NO_LIMIT)
        num_layers = history.shape[1]
        if num_layers:
            replan_layers[(num_layers,)](*self._arguments(history, out, previous, price, limit), **self.plan.options)

    def _arguments(
        self, history: Tensor, out: Outputs, previous: Tensor | None, price: float, limit: int
    ) -> tuple[Any, ...]:
        strides = history.stride()
        return (
            history, *strides, history.shape[0], previous, price_bits(price), limit, self._partitions,
            self.workspace, out, self.plan.shape,
        )  # fmt: skip

    def _check(self, history: Tensor, out: Outputs, previous: Tensor | None) -> None:
        num_steps = history.shape[0] if history.dim() == 3 else 0
        if history.dim() != 3 or tuple(history.shape[1:]) != self._history_shape:
            raise ValueError(
                f"history has shape {tuple(history.shape)}, must be [steps, layers, experts] with layers, experts = "
                f"{self._history_shape}"
            )
        if not 1 <= num_steps <= self.steps:
            raise ValueError(f"history has {num_steps} steps, must have 1 to {self.steps}, the `steps` it was made for")
        if history.dtype != self.loads_dtype:
            raise ValueError(f"history has dtype {history.dtype}, must be {self.loads_dtype}")
        if history.device != self.device:
            raise ValueError(f"history is on {history.device}, must be on {self.device}")
        for name, (shape, dtype) in self.shapes.items():
            _check_tensor(f"out.{name}", getattr(out, name), shape, dtype, self.device)
        if previous is not None:
            _check_tensor("previous", previous, *self.shapes["phy2log"], self.device)
            if previous.data_ptr() == out.phy2log.data_ptr() and previous.numel():
                raise ValueError("previous is out.phy2log, must not share its memory; plan into other tensors")

    def _compile(self, topology: Topology) -> None:
        """For a history of any steps and strides, with and without a placement in force."""
        history = torch.empty((1, *self._history_shape), dtype=self.loads_dtype, device=self.device)
        out = self.empty()
        for previous in (None, torch.empty_like(out.phy2log)):
            arguments = self._arguments(history, out, previous, 0.0, NO_LIMIT)
            built = replan_layers.warmup(*arguments, grid=(1,), **self.plan.options)
            built[(self._history_shape[0], 1, 1)]  # loads the module, which a capture would not allow


def output_shapes(
    topology: Topology, num_layers: int, num_experts: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    P = topology.num_replicas  # noqa: N806
    of_layers = (num_layers,)
    return {
        "phy2log": ((num_layers, P), dtype),
        "phyrank": ((num_layers, P), dtype),
        "logcnt": ((num_layers, num_experts), dtype),
        "log2phy": ((num_layers, num_experts, P - num_experts + 1), dtype),
        "written": (of_layers, torch.int64),
        "fills": (of_layers, torch.int64),
        "peak_before": (of_layers, torch.float64),
        "peak_after": (of_layers, torch.float64),
        "status": (of_layers, torch.int32),
        "bad": (of_layers, torch.int32),
    }


def workspace(shape: ReplanShape, num_layers: int, device: torch.device | str) -> Memory:
    return Memory(
        torch.empty((num_layers, shape.num_ints), dtype=torch.int32, device=device),
        torch.empty((num_layers, shape.num_longs), dtype=torch.int64, device=device),
        torch.empty((num_layers, shape.num_bytes), dtype=torch.uint8, device=device),
    )


def _check_tensor(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor is None:
        raise ValueError(f"{name} is None, must be a tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, must be {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
