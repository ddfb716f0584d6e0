# mypy: disable-error-code="import-untyped"
"""What is launched for a shape: kernels, constants, options. A function of the shape alone; needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eplb_triton.buffers import check_map_dtype
from eplb_triton.kernels.buffers import ROW_BYTES, Maps
from eplb_triton.kernels.fused import plan_rows
from eplb_triton.kernels.measure import measure_rows
from eplb_triton.kernels.shapes import WIDE_FROM, Shape, shape_of
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Policy
from eplb_triton.topology import Topology

WARP = 64 if torch.version.hip else 32
"""Threads of a warp of the GPUs that this PyTorch is for."""
MOST_EXPERTS, MOST_REPLICAS, MOST_GPUS = 2048, 4096, 2048

TRITON_TYPE = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel of a launch: what `triton.compile(ASTSource(function, signature, constexprs))` needs."""

    function: Any
    signature: dict[str, Any]  # type of every argument, a tuple of them for a tuple, "constexpr" included
    constexprs: dict[tuple[int, ...], Any]  # by place
    num_warps: int
    max_registers: int | None  # None: the target has no such option (AMD)

    @property
    def options(self) -> dict[str, Any]:
        """Compile and launch options. Contraction off: every operation of a plan rounds once. One stage: Triton
        pipelines no loop of ours, and to find that out, loop by loop, takes half a second of a replan's compilation. No
        checks for overflow: some products wrap on purpose, and with TRITON_DEBUG set a check would end the process;
        without it checks are dead code, which takes 6 % of a replan's compilation. A limit on registers that none
        reaches: without one, ptxas keeps to 72 or 80 and now and then spills a value."""
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False, "sanitize_overflow": False}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options


@dataclass(frozen=True)
class LaunchPlan:
    """How a shape is launched: `kernels` in order, each on `grid(num_layers)`."""

    kernels: tuple[KernelSpec, ...]
    shape: Shape
    num_groups: int

    @property
    def num_nodes(self) -> int:
        return self.shape.num_nodes

    def grid(self, num_layers: int) -> tuple[int, int]:
        return num_layers, self.num_nodes

    def scratch_bytes(self, num_layers: int) -> int:
        """Bytes of scratch: a block a row, then the statistics, three float64 numbers a row."""
        row_bytes: int = ROW_BYTES.value * self.shape.scratch
        return num_layers * self.num_nodes * (row_bytes + 3 * 8)

    def scratch(self, num_layers: int, device: torch.device | str) -> Tensor:
        """Scratch for `num_layers` layers on `device`: may be reused by later launches on the same stream, its content
        is never read."""
        return torch.empty(self.scratch_bytes(num_layers), dtype=torch.uint8, device=device)

    def partitions(self, device: torch.device | str) -> Tensor:
        """int32 [ways, G] on `device`: the groups of all nodes of every partition; empty: none is tried."""
        ways = self.shape.partition.ways
        table = partitions_to_try(self.num_groups, self.num_nodes) if ways else ()
        return torch.tensor(table, dtype=torch.int32, device="cpu").view(ways, self.num_groups).to(device)


@lru_cache(maxsize=256)
def launch_plan(
    topology: Topology,
    num_experts: int,
    policy: Policy,
    *,
    loads_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.int64,
    log2phy_width: int | None = None,
    lanes: int = 32,
) -> LaunchPlan:
    """How loads [L, num_experts] are planned; a function of the shape alone, needs no GPU.

    Args:
        topology: counts of the cluster.
        num_experts: E.
        policy: the choice at each stage.
        loads_dtype: of the loads.
        dtype: of the maps, torch.int32 or torch.int64.
        log2phy_width: last dimension of log2phy, None if it is not filled; P - E + 1 holds any plan.
        lanes: threads of a warp, 32 or (AMD) 64.

    Raises:
        ValueError: a size is above what the kernels are made for, or a type is none of theirs.
    """
    check_sizes(topology, num_experts)
    topology.check_experts(num_experts)
    check_map_dtype(dtype)
    check_loads_dtype(loads_dtype)
    check_log2phy_width(log2phy_width)
    shape = shape_of(topology, num_experts, policy, log2phy_width or 1, lanes)
    index = "*" + TRITON_TYPE[dtype]
    signature: dict[str, Any] = {
        "loads_ptr": "*" + TRITON_TYPE[loads_dtype],
        "layer_stride": "i64",
        "expert_stride": "i64",
        "num_rows": "i32",
        "log2phy_layer_stride": "i64",
        "log2phy_stride": "i64",
        "scratch_ptr": "*u8",
        "partitions_ptr": "*i32",
        "maps": Maps(index, index, index, index if log2phy_width else "constexpr", "*i32"),
        "shape": "constexpr",
    }
    kernels = [_spec(plan_rows, signature, shape, lanes)]
    if policy.counts in ("dispersion", "simulated") and topology.num_replicas > num_experts:
        kernels.insert(0, _spec(measure_rows, signature, shape, lanes))
    return LaunchPlan(tuple(kernels), shape, topology.planned_groups)


def check_loads_dtype(loads_dtype: torch.dtype) -> None:
    """Refuse loads that no kernel reads.

    Raises:
        ValueError: names the types that they read.
    """
    if loads_dtype not in TRITON_TYPE:
        raise ValueError(f"loads_dtype={loads_dtype} must be one of {', '.join(map(str, TRITON_TYPE))}")


def check_log2phy_width(log2phy_width: int | None) -> None:
    """Refuse a log2phy that has no room for a replica.

    Raises:
        ValueError: the width is below 1.
    """
    if log2phy_width is not None and log2phy_width < 1:
        raise ValueError(f"log2phy_width={log2phy_width} must be at least 1, or None for no log2phy")


def check_sizes(topology: Topology, num_experts: int) -> None:
    """Refuse what no kernel is made for.

    Raises:
        ValueError: names the count, its value and the most that it may be.
    """
    for name, value, most in (
        ("num_experts", num_experts, MOST_EXPERTS),
        ("num_replicas", topology.num_replicas, MOST_REPLICAS),
        ("num_gpus", topology.num_gpus, MOST_GPUS),
    ):
        if value > most:
            raise ValueError(
                f"{name}={value} must be at most {most} for backend 'triton'; on the CPU there is no limit"
            )


def _spec(function: Any, types: dict[str, Any], shape: Shape, lanes: int) -> KernelSpec:
    names = function.arg_names
    constexprs: dict[tuple[int, ...], Any] = {(names.index("shape"),): shape}
    if "maps" in names and types["maps"].log2phy == "constexpr":
        constexprs[names.index("maps"), Maps._fields.index("log2phy")] = None
    num_warps = _num_warps(shape, lanes)
    registers = (168 if num_warps == 1 else 128) if lanes == 32 else None
    return KernelSpec(function, {name: types[name] for name in names}, constexprs, num_warps, registers)


def _num_warps(shape: Shape, lanes: int) -> int:
    """One warp where a row is small: its steps wait for one another. Wide tiles (sorts, divisions) gain from more, and
    the packing step loses nothing: a tile of up to 32 packs is held, and reduced, by every warp."""
    if shape.policy.gpu_refine.rule == "exchange" and shape.replicas.num_packs >= WIDE_FROM:
        return 512 // lanes  # threads
    width = max(shape.experts.expert_lanes, shape.replicas.pack_lanes)
    return 1 if width <= 128 else 4 if width <= 512 else 8
