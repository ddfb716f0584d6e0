# mypy: disable-error-code="import-untyped"
"""The launcher of replanning: everything that waits, compiles or allocates is done once, when it is made."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.buffers import check_map_dtype
from eplb_triton.kernels import launcher
from eplb_triton.kernels.arith import triton_version
from eplb_triton.kernels.launcher import Pointer, Runner, load_kernel, run_on
from eplb_triton.kernels.replanning import Memory, Outputs, replan_layers
from eplb_triton.kernels.replanning_shapes import ReplanShape, replan_plan
from eplb_triton.kernels.specs import TRITON_TYPE, WARP, check_loads_dtype
from eplb_triton.policy import Policy
from eplb_triton.topology import Topology

NO_LIMIT = 0x7FFFFFFF
OLDEST_TRITON = (3, 5)
"""3.4 dies of a segmentation fault while it reads the kernel."""
_INTERPRETED = not isinstance(replan_layers, triton.runtime.JITFunction)


def price_bits(price: float) -> int:
    """The bits of a float64 as int64: Triton takes a Python float for a float32."""
    return int(struct.unpack("<q", struct.pack("<d", price))[0])


class ReplanLaunch:
    """Replanning on a GPU, made once: compiled, loaded and allocated here. A call fills tensors that are there, on the
    current stream, and waits for nothing.

    Args:
        topology: counts of the cluster.
        num_layers: L.
        num_experts: E.
        policy: one with `replan`.
        steps: most steps of a history.
        loads_dtype: of the histories.
        dtype: of the maps, torch.int64 or torch.int32.
        log2phy_width: last dimension of log2phy; None: log2phy is not filled.
        device: of all tensors: a GPU; in Triton's interpreter any whose memory NumPy can see.

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
        log2phy_width: int | None = None,
        device: torch.device | str,
    ) -> None:
        check_map_dtype(dtype)
        check_loads_dtype(loads_dtype)
        if not _INTERPRETED:
            _check_compiler(policy)
        self.device = launcher.resolve_device(device)
        self.plan = replan_plan(
            topology, num_experts, policy, steps=steps, log2phy_width=log2phy_width, warp=WARP, wide=_INTERPRETED
        )
        self.steps, self.loads_dtype, self.dtype = steps, loads_dtype, dtype
        self.shapes = output_shapes(topology, num_layers, num_experts, dtype, log2phy_width)
        self._history_shape = (num_layers, num_experts)
        self.workspace = workspace(self.plan.shape, num_layers, self.device)
        self._partitions = self.plan.partitions.to(self.device)
        self._first, self._next = (self._load(previous=previous) for previous in (False, True))

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
            out: as `empty()` makes them: contiguous, aligned to 16 bytes; log2phy with any strides but 1 in the last.
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
        strides = (0, 0) if out.log2phy is None else out.log2phy.stride()
        run_on(
            self.device.index, self._first if previous is None else self._next,
            history, *history.stride(), history.shape[0], previous, price_bits(price), limit, strides[0], strides[1],
            self._partitions, self.workspace, out, self.plan.shape,
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

    def _load(self, *, previous: bool) -> Runner:
        """The kernel for a history of any steps and strides, with a placement in force or without."""
        index = f"*{TRITON_TYPE[self.dtype]}"
        stand_ins: dict[str, Any] = {
            "loads_ptr": Pointer(f"*{TRITON_TYPE[self.loads_dtype]}", 1),  # never specialised, as the numbers
            "previous_ptr": Pointer(index, 1) if previous else None,
            "partitions_ptr": self._partitions,
            "workspace": self.workspace,
            "out": Outputs(**{"log2phy": None, **{name: _pointer(*its) for name, its in self.shapes.items()}}),
            "shape": self.plan.shape,
        }
        kernel = self.plan.kernel(previous=previous, loads_dtype=self.loads_dtype, dtype=self.dtype)
        arguments = [stand_ins.get(name, 1) for name in kernel.signature]
        return load_kernel(kernel.function, (self._history_shape[0], 1, 1), arguments, kernel.options, self.device)


def _check_compiler(policy: Policy) -> None:
    if triton_version() < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise ValueError(
            f"policy={policy.name!r} on a GPU needs triton >= {oldest}, found {triton.__version__}, whose compiler "
            "dies of this kernel; install a newer one (torch >= 2.9), or plan with backend='cpu'"
        )


def output_shapes(
    topology: Topology, num_layers: int, num_experts: int, dtype: torch.dtype, log2phy_width: int | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of `Outputs`, in their order; without log2phy where there is no width."""
    slots, of_layers = (num_layers, topology.num_replicas), (num_layers,)
    log2phy = {} if log2phy_width is None else {"log2phy": ((num_layers, num_experts, log2phy_width), dtype)}
    return {
        "phy2log": (slots, dtype),
        "phyrank": (slots, dtype),
        "logcnt": ((num_layers, num_experts), dtype),
        **log2phy,
        "written": (of_layers, torch.int64),
        "fills": (of_layers, torch.int64),
        "peak_before": (of_layers, torch.float64),
        "peak_after": (of_layers, torch.float64),
        "status": (of_layers, torch.int32),
        "bad": ((num_layers, topology.planned_nodes), torch.int32),
    }


def _pointer(shape: tuple[int, ...], dtype: torch.dtype) -> Pointer:
    return Pointer(f"*{TRITON_TYPE[dtype]}", math.prod(shape))


def workspace(shape: ReplanShape, num_layers: int, device: torch.device | str) -> Memory:
    return Memory(
        torch.empty((num_layers, shape.num_ints), dtype=torch.int32, device=device),
        torch.empty((num_layers, shape.num_longs), dtype=torch.int64, device=device),
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
    if name == "out.log2phy":
        if tensor.stride(2) != 1 and shape[2] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}, must have entries of an expert side by side")
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
