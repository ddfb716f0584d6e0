# mypy: disable-error-code="import-untyped"
"""Launches: a `Launch` checks, compiles and allocates, and then only launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from eplb_triton.kernels.buffers import Maps
from eplb_triton.kernels.fused import plan_rows
from eplb_triton.kernels.specs import TRITON_TYPE, WARP, KernelSpec, LaunchPlan, launch_plan
from eplb_triton.policy import Policy
from eplb_triton.topology import Topology

_INTERPRETED = not isinstance(plan_rows, triton.runtime.JITFunction)
Runner = Callable[..., object]


class Buffers(Protocol):
    """Tensors that a launch fills, on its device, aligned to 16 bytes, contiguous but for log2phy.

    phy2log [L, P], phyrank [L, P], logcnt [L, E] and log2phy [L, E, width] or None, all of one integer type; log2phy
    with any strides but 1 in the last. bad [L, N] int32: lowest logical expert of the row whose load was bad (and
    counted as 0), else -1; -2 where no load was bad and log2phy lacks a replica of some expert, being too narrow.
    """

    @property
    def phy2log(self) -> Tensor: ...
    @property
    def phyrank(self) -> Tensor: ...
    @property
    def logcnt(self) -> Tensor: ...
    @property
    def log2phy(self) -> Tensor | None: ...
    @property
    def bad(self) -> Tensor | None: ...


class Launch:
    """Plans of one shape on one device: everything is checked, compiled and allocated here, nothing later.

    Args:
        topology: counts of the cluster.
        num_layers: L.
        num_experts: E.
        policy: the choice at each stage.
        loads_dtype: of the loads that it will be called with.
        dtype: of the maps, torch.int64 or torch.int32.
        log2phy_width: last dimension of log2phy; None: log2phy is not filled.
        device: a GPU; in Triton's interpreter any device whose memory NumPy can see.

    `scratch` and `partitions` are what its kernels use besides loads and maps, replays of a captured graph included:
    the Launch owns them, and whoever captures it keeps it.

    Raises:
        ValueError: a size or a type is none that the kernels take; the device is no GPU.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        policy: Policy,
        *,
        loads_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.int64,
        log2phy_width: int | None = None,
        device: torch.device | str,
    ) -> None:
        if num_layers < 0:
            raise ValueError(f"num_layers={num_layers} must be at least 0")
        self.device = resolve_device(device)
        self.plan = launch_plan(
            topology, num_experts, policy, loads_dtype=loads_dtype, dtype=dtype, log2phy_width=log2phy_width,
            lanes=WARP,
        )  # fmt: skip
        self.num_layers = num_layers
        self.scratch = self.plan.scratch(num_layers, self.device)
        self.partitions = _partitions(self.plan, self.device)
        self._index = self.device.index
        self._num_rows = num_layers * self.plan.num_nodes
        grid = (*self.plan.grid(num_layers), 1)
        runners = [
            load_kernel(kernel.function, grid, self._stand_ins(kernel), kernel.options, self.device)
            for kernel in self.plan.kernels
        ]
        self._measure = runners[0] if len(runners) > 1 else None
        self._fuse = runners[-1]

    def __call__(self, loads: Tensor, maps: Buffers) -> None:
        """Plan every layer on the current stream of the device: no wait, no allocation, nothing compiled.

        Args:
            loads: [L, E] of `loads_dtype` on the device, tokens per expert, any strides.
            maps: what to fill, as `Buffers` says; not checked here.
        """
        run_on(self._index, self._launch, loads, maps)

    def _launch(self, loads: Tensor, maps: Buffers) -> None:
        layer_stride, expert_stride = loads.stride()
        num_rows, scratch, partitions, shape = self._num_rows, self.scratch, self.partitions, self.plan.shape
        if self._measure is not None:
            self._measure(loads, layer_stride, expert_stride, num_rows, scratch, partitions, shape)
        log2phy = maps.log2phy
        strides = (0, 0) if log2phy is None else log2phy.stride()
        self._fuse(
            loads, layer_stride, expert_stride, num_rows, strides[0], strides[1], scratch, partitions,
            Maps(maps.phy2log, maps.phyrank, maps.logcnt, log2phy, maps.bad), shape,
        )  # fmt: skip

    def _stand_ins(self, kernel: KernelSpec) -> list[Any]:
        """Arguments that have the types of those of a launch, its alignment, and its sizes."""
        types, plan = kernel.signature, self.plan
        rows, experts, replicas = self._num_rows, plan.shape.num_experts, plan.shape.num_replicas
        width = plan.shape.log2phy_width
        elements = *(self.num_layers * n for n in (replicas, replicas, experts, experts * width)), rows
        stand_ins: dict[str, Any] = {
            "loads_ptr": Pointer(types["loads_ptr"], 1),  # never specialised
            "num_rows": rows,
            "scratch_ptr": self.scratch,
            "partitions_ptr": self.partitions,
            "shape": plan.shape,
        }
        if "maps" in types:
            stand_ins["maps"] = Maps(*map(_pointer, types["maps"], elements))
        return [stand_ins.get(name, 1) for name in types]


def load_kernel(
    function: Any, grid: tuple[int, int, int], stand_ins: Sequence[Any], options: dict[str, Any], device: torch.device
) -> Runner:
    """`function` on `grid`, compiled for arguments like `stand_ins` and loaded on `device`: called with a launch's
    arguments, in their order, it only launches."""
    if not all(grid):
        return _nothing
    if _INTERPRETED:
        return partial(function[grid], **options)
    with torch.cuda.device(device):
        built = function.warmup(*stand_ins, grid=grid, **options)
        runner: Runner = built[grid]  # loads the module, which a capture would not allow
    return runner


def run_on(index: int | None, run: Runner, *arguments: Any) -> None:
    """`run` on the current stream of GPU `index`, which need not be the current one."""
    if _INTERPRETED or torch.cuda.current_device() == index:
        run(*arguments)
    else:
        with torch.cuda.device(index):
            run(*arguments)


def _nothing(*_: object) -> None:
    """No layers: nothing to launch."""


def _pointer(kind: str, elements: int) -> Pointer | None:
    return None if kind == "constexpr" else Pointer(kind, elements)


class Pointer:
    """What Triton asks a tensor for when it compiles: its type, its alignment and how far it reaches."""

    def __init__(self, kind: str, elements: int) -> None:
        self.dtype = next(dtype for dtype, name in TRITON_TYPE.items() if "*" + name == kind)
        self._bytes = elements * self.dtype.itemsize

    def data_ptr(self) -> int:
        return 0  # a multiple of 16

    def ptr_range(self) -> int:
        return self._bytes


_TABLES: dict[tuple[int, int, torch.device], Tensor] = {}
"""Partitions by ways, nodes and device: a few KB each, kept for good, since they are the same for every Launch."""


def _partitions(plan: LaunchPlan, device: torch.device) -> Tensor:
    key = plan.shape.partition.ways, plan.num_nodes, device
    if key not in _TABLES:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first plan of its kind cannot be captured: make the planner before the capture")
        with ThreadPoolExecutor(1) as apart:  # this thread may be allocating in the pool of a graph
            _TABLES[key] = apart.submit(plan.partitions, device).result()
    return _TABLES[key]


def resolve_device(device: torch.device | str) -> torch.device:
    """`device`, a GPU, with its number.

    Raises:
        ValueError: it is none.
    """
    found = torch.device(device)
    if _INTERPRETED:
        return found
    if found.type != "cuda":  # PyTorch calls AMD's GPUs cuda too
        raise ValueError(f"device={str(found)!r} must be a GPU for backend 'triton'; on the CPU, plan with 'cpu'")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


class Outputs(NamedTuple):
    """New tensors of a launch: as `Buffers`, log2phy of width P - E + 1."""

    phy2log: Tensor
    phyrank: Tensor
    logcnt: Tensor
    log2phy: Tensor | None
    bad: Tensor


def launch(
    loads: Tensor,
    topology: Topology,
    policy: Policy,
    *,
    dtype: torch.dtype = torch.int64,
    want_log2phy: bool = False,
) -> Outputs:
    """Plan every layer of `loads` [L, E] on the current stream into new tensors: a `Launch` used once.

    Raises:
        ValueError: as `Launch`.
    """
    num_layers, num_experts = loads.shape
    shapes = topology.map_shapes(num_layers, num_experts, log2phy=want_log2phy)
    maps = {
        name: torch.empty(shape, dtype=torch.int32 if name == "bad" else dtype, device=loads.device)
        for name, shape in shapes.items()
    }
    out = Outputs(maps["phy2log"], maps["phyrank"], maps["logcnt"], maps.get("log2phy"), maps["bad"])
    width = None if out.log2phy is None else out.log2phy.shape[2]
    Launch(
        topology, num_layers, num_experts, policy, loads_dtype=loads.dtype, dtype=dtype, log2phy_width=width,
        device=loads.device,
    )(loads, out)  # fmt: skip
    return out


def first_bad_load(bad: Tensor) -> tuple[int, int] | None:
    """(layer, expert) of the first bad load that `Buffers.bad` [L, N] records, or None. Waits for the device."""
    by_layer = bad.cpu()
    layers = (by_layer >= 0).any(1).nonzero()
    if not len(layers):
        return None
    layer = int(layers[0])
    return layer, int(by_layer[layer][by_layer[layer] >= 0].min())
