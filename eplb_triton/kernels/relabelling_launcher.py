# mypy: disable-error-code="import-untyped"
"""The launcher of relabelling: everything that waits, compiles or allocates is done once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.buffers import check_map_dtype
from eplb_triton.kernels import launcher
from eplb_triton.kernels.buffers import Maps
from eplb_triton.kernels.launcher import Buffers, Pointer, Runner, load_kernel, run_on
from eplb_triton.kernels.relabelling import Scratch, relabel_layers
from eplb_triton.kernels.shapes import starts_of
from eplb_triton.kernels.specs import TRITON_TYPE, WARP, KernelSpec, check_log2phy_width, check_sizes
from eplb_triton.topology import Topology

_INTERPRETED = not isinstance(relabel_layers, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Places:
    """Where each array of a layer begins, in elements of `Scratch`, int32."""

    before: int  # [P] expert in each slot
    slot: int  # [P]
    shared: int  # [max(D * d, N * N)] replicas that packs share
    order: int  # [D]
    partner: int  # [D]
    kept: int  # [2, P]
    placed: int  # [P]
    rank: int  # [P]
    count: int  # [E] replicas
    link: int  # [E + P] lists of slots
    first: int  # [E] place of an expert among all slots by expert
    last: int  # [E]
    listed: int  # [P] slots by expert


@dataclass(frozen=True)
class RelabelShape:
    """Everything that the kernel is compiled for; names as in ReplanShape, whose stages it shares."""

    experts: int
    replicas: int
    gpus: int
    nodes: int
    slots: int
    log2phy_width: int  # 1 if it is not wanted
    lanes: int  # of tiles of slots and of pairs
    expert_lanes: int
    replica_lanes: int
    gpu_lanes: int
    num_ints: int
    at: Places


@lru_cache(maxsize=256)
def relabel_spec(
    topology: Topology,
    num_experts: int,
    *,
    dtype: torch.dtype = torch.int64,
    log2phy_width: int | None = None,
    warp: int = 32,
    wide: bool = False,
) -> tuple[KernelSpec, RelabelShape]:
    """The kernel that relabels plans [L, P], on a grid of the layers; a function of the shape alone, needs no GPU.

    Args:
        topology: counts of the cluster.
        num_experts: E.
        dtype: of the maps, torch.int32 or torch.int64.
        log2phy_width: last dimension of log2phy, None if it is not filled; P - E + 1 holds any plan.
        warp: threads of a warp, 32 or (AMD) 64.
        wide: tiles as wide as their loops, which Triton's interpreter takes least time for.

    Raises:
        ValueError: a size is above what the kernels are made for, or a type is none of theirs.
    """
    check_sizes(topology, num_experts)
    check_map_dtype(dtype)
    check_log2phy_width(log2phy_width)
    width = max(num_experts, topology.num_replicas)
    num_warps = 1 if width <= 64 else 8
    most = triton.next_power_of_2(topology.num_replicas * max(topology.gpus_per_node, topology.planned_nodes))
    lanes = max(num_warps * warp, min(most, 4096) if wide else 0)
    shape = _shape(topology, num_experts, log2phy_width or 1, warp, lanes)
    index = "*" + TRITON_TYPE[dtype]
    signature: dict[str, Any] = {
        "before_ptr": index,
        "log2phy_layer_stride": "i64",
        "log2phy_stride": "i64",
        "scratch": Scratch("*i32"),
        "maps": Maps(index, index, index, index if log2phy_width else "constexpr", "*i32"),
        "shape": "constexpr",
    }
    names = list(signature)
    constexprs: dict[tuple[int, ...], Any] = {(names.index("shape"),): shape}
    if not log2phy_width:
        constexprs[names.index("maps"), Maps._fields.index("log2phy")] = None
    registers = (168 if num_warps == 1 else 128) if warp == 32 else None
    return KernelSpec(relabel_layers, signature, constexprs, num_warps, registers), shape


def _shape(topology: Topology, num_experts: int, log2phy_width: int, warp: int, lanes: int) -> RelabelShape:
    E, P, D, N = num_experts, topology.num_replicas, topology.num_gpus, topology.planned_nodes  # noqa: N806
    expert_lanes, replica_lanes, gpu_lanes = (max(warp, triton.next_power_of_2(size)) for size in (E, P, D))
    pairs = max(D * topology.gpus_per_node, N * N)
    ints = {
        "before": P, "slot": P, "shared": pairs, "order": D, "partner": D, "kept": 2 * P, "placed": P,
        "rank": P, "count": E, "link": E + P, "first": E, "last": E, "listed": P,
    }  # fmt: skip
    starts, num_ints = starts_of(ints)
    return RelabelShape(
        E, P, D, N, topology.slots_per_gpu, log2phy_width, lanes, expert_lanes, replica_lanes, gpu_lanes,
        num_ints, Places(**starts),
    )  # fmt: skip


class RelabelLaunch:
    """Relabelling on a GPU, made once: compiled, loaded and allocated here. A call works on tensors that are there, on
    the current stream, and waits for nothing.

    Args:
        topology: counts of the cluster.
        num_layers: L.
        num_experts: E.
        dtype: of the maps, torch.int64 or torch.int32.
        log2phy_width: last dimension of log2phy; None: log2phy is not filled.
        device: a GPU; in Triton's interpreter any device whose memory NumPy can see.

    Raises:
        ValueError: a size or a type is none that the kernel takes; the device is no GPU.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        *,
        dtype: torch.dtype = torch.int64,
        log2phy_width: int | None = None,
        device: torch.device | str,
    ) -> None:
        self.device = launcher.resolve_device(device)
        kernel, self._shape = relabel_spec(
            topology, num_experts, dtype=dtype, log2phy_width=log2phy_width, warp=WARP, wide=_INTERPRETED
        )
        self.scratch = scratch(self._shape, num_layers, self.device)
        self._index = self.device.index
        replicas, experts, nodes = topology.num_replicas, num_experts, topology.planned_nodes
        sizes = replicas, replicas, experts, experts * (log2phy_width or 0), nodes
        types: Maps = kernel.signature["maps"]
        maps = (
            None if kind == "constexpr" else Pointer(kind, num_layers * size)
            for kind, size in zip(types, sizes, strict=True)
        )
        before = Pointer(kernel.signature["before_ptr"], num_layers * replicas)
        stand_ins = before, 1, 1, self.scratch, Maps(*maps), self._shape
        self._run: Runner = load_kernel(kernel.function, (num_layers, 1, 1), stand_ins, kernel.options, self.device)

    def __call__(self, before: Tensor, maps: Buffers) -> None:
        """Relabel the plan that `maps` hold, and write all of them anew: replicas are ranked by their slots.

        Args:
            before: [L, P] of the maps' type on the device, contiguous, the slots in force; what is no expert shares
                nothing. Shares no memory with the maps.
            maps: as `Buffers` says, written by a launch before on the same stream; not checked here. The rows of `bad`
                go with their nodes, and each -1 of a layer becomes -2 where log2phy lacks a replica.

        Raises:
            ValueError: `before` is not contiguous.
        """
        if not before.is_contiguous():
            raise ValueError(f"before has strides {before.stride()}, must be contiguous")
        log2phy = maps.log2phy
        strides = (0, 0) if log2phy is None else log2phy.stride()
        run_on(
            self._index, self._run, before, strides[0], strides[1], self.scratch,
            Maps(maps.phy2log, maps.phyrank, maps.logcnt, log2phy, maps.bad), self._shape,
        )  # fmt: skip


def scratch(shape: RelabelShape, num_layers: int, device: torch.device | str) -> Scratch:
    """Scratch for `num_layers` layers on `device`; its content is never read."""
    return Scratch(torch.empty((num_layers, shape.num_ints), dtype=torch.int32, device=device))
