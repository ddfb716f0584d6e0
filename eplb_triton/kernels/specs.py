# mypy: disable-error-code="import-untyped"
"""What is launched for a shape: kernels, constants, options. A function of the shape alone; needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from eplb_triton.kernels.fused import plan_rows
from eplb_triton.kernels.measure import measure_rows
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Corner, Exchange, Fixup, Nearest, Paired, Peak, Policy
from eplb_triton.topology import Topology

MOST_EXPERTS, MOST_REPLICAS, MOST_GPUS = 2048, 4096, 2048
ROUNDS_FROM = 32  # GPUs a row from which packing in rounds beats one item a step (cycles from SASS)
MOST_MEETINGS = 256  # 2 a thread in 4 warps: at 4 a row of 1,024 replicas spills 8 bytes, at 8 it spills 288
PACKS_PER_PROPOSER = 8  # as in the reference
AT_ONCE_FROM = 32  # redundant replicas a row from which D'Hondt picks by threshold beat one pick a step

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


class Workspace(NamedTuple):
    """Scratch of a launch: may be reused by later launches on the same stream, its content is never read."""

    statistics: Tensor  # float64 [3, L * N]
    floats: Tensor  # float32 [L * N, 3, scratch]
    ints: Tensor  # int32 [L * N, 12, scratch]
    longs: Tensor  # int64 [L * N, scratch]
    doubles: Tensor  # float64 [L * N, scratch]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel of a launch: what `triton.compile(ASTSource(function, signature, constexprs))` needs."""

    function: Any
    signature: dict[str, str]  # type of every argument, "constexpr" included
    constexprs: dict[str, Any]
    num_warps: int
    max_registers: int | None  # None: the target has no such option (AMD)

    @property
    def options(self) -> dict[str, Any]:
        """Compile and launch options. Contraction off: every operation of a plan rounds once. A limit on registers that
        none reaches: without one, ptxas keeps to 72 or 80 and now and then spills a value."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """What a launch passes by name: constants and options. An absent pointer is passed by place, as the others."""
        return {name: value for name, value in self.constexprs.items() if value is not None} | self.options


@dataclass(frozen=True)
class LaunchPlan:
    """How a shape is launched: `kernels` in order, each on `grid(num_layers)`."""

    kernels: tuple[KernelSpec, ...]
    num_nodes: int
    scratch: int  # elements of one scratch array of a row
    partitions: Tensor  # int32 [WAYS, G] on the CPU: the groups of all nodes of every partition; empty: none is tried

    def grid(self, num_layers: int) -> tuple[int, int]:
        return num_layers, self.num_nodes

    def workspace_shapes(self, num_layers: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and type of each tensor of a `Workspace` for `num_layers` layers."""
        rows = num_layers * self.num_nodes
        return (
            ((3, rows), torch.float64),
            ((rows, 3, self.scratch), torch.float32),
            ((rows, 12, self.scratch), torch.int32),
            ((rows, self.scratch), torch.int64),
            ((rows, self.scratch), torch.float64),
        )

    def workspace(self, num_layers: int, device: torch.device | str) -> Workspace:
        """Scratch for `num_layers` layers on `device`."""
        shapes = self.workspace_shapes(num_layers)
        return Workspace(*(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes))


@lru_cache(maxsize=256)
def launch_plan(
    topology: Topology,
    num_experts: int,
    policy: Policy,
    *,
    weight_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.int64,
    want_log2phy: bool = False,
    lanes: int = 32,
) -> LaunchPlan:
    """How loads [L, num_experts] are planned; a function of the shape alone, needs no GPU.

    Args:
        topology: counts of the cluster.
        num_experts: E.
        policy: the choice at each stage.
        weight_dtype: of the loads.
        dtype: of the maps, torch.int32 or torch.int64.
        want_log2phy: whether log2phy is filled as well.
        lanes: threads of a warp, 32 or (AMD) 64.

    Raises:
        ValueError: a size is above what the kernels are made for, or a type is none of theirs.
    """
    _check_sizes(topology, num_experts)
    topology.check_experts(num_experts)
    if dtype not in (torch.int32, torch.int64):
        raise ValueError(f"dtype={dtype} must be torch.int64 or torch.int32")
    if weight_dtype not in TRITON_TYPE:
        raise ValueError(f"weight_dtype={weight_dtype} must be one of {', '.join(map(str, TRITON_TYPE))}")
    shape = _shape(topology, num_experts, policy, lanes)
    index = "*" + TRITON_TYPE[dtype]
    inputs = {
        "weight_ptr": "*" + TRITON_TYPE[weight_dtype],
        "layer_stride": "i32",
        "expert_stride": "i32",
        "num_rows": "i32",
        "statistics_ptr": "*fp64",
        "floats_ptr": "*fp32",
        "ints_ptr": "*i32",
        "longs_ptr": "*i64",
        "doubles_ptr": "*fp64",
        "partitions_ptr": "*i32",
    }
    outputs = {"phy2log_ptr": index, "phyrank_ptr": index, "logcnt_ptr": index, "log2phy_ptr": index, "bad_ptr": "*i32"}
    absent = {} if want_log2phy else {"log2phy_ptr": None}
    kernels = [_spec(plan_rows, inputs | outputs, shape | absent, lanes)]
    if policy.counts in ("dispersion", "simulated") and topology.num_replicas > num_experts:
        kernels.insert(0, _spec(measure_rows, inputs, shape, lanes))
    return LaunchPlan(tuple(kernels), topology.planned_nodes, shape["SCRATCH"], _partitions(topology, shape["WAYS"]))


def _check_sizes(topology: Topology, num_experts: int) -> None:
    for name, value, most in (
        ("num_experts", num_experts, MOST_EXPERTS),
        ("num_replicas", topology.num_replicas, MOST_REPLICAS),
        ("num_gpus", topology.num_gpus, MOST_GPUS),
    ):
        if value > most:
            raise ValueError(
                f"{name}={value} must be at most {most} for backend 'triton'; on the CPU there is no limit"
            )


def _shape(topology: Topology, num_experts: int, policy: Policy, lanes: int) -> dict[str, Any]:
    """Every constexpr of both kernels: sizes, sizes padded to powers of two of at least a warp, policy fields."""
    groups, nodes = topology.planned_groups, topology.planned_nodes
    gpus, slots = topology.gpus_per_node, topology.slots_per_gpu
    pads = {
        "EXPERTS": num_experts // nodes,
        "REPLICAS": topology.replicas_per_node,
        "GROUPS": groups,
        "NODES": nodes,
        "GPUS": gpus,
        "SLOTS": slots,
        "GROUP_SLOTS": groups // nodes,
        "PICKS": (topology.num_replicas - num_experts) // nodes,
    }
    padded = {name: max(lanes, triton.next_power_of_2(size)) for name, size in pads.items()}
    padded["RANKS"] = triton.next_power_of_2(topology.num_replicas - num_experts + 1)
    fixup = policy.fixup if isinstance(policy.fixup, Fixup) else None
    return {
        "NUM_EXPERTS": num_experts,
        "NUM_REPLICAS": topology.num_replicas,
        "NUM_GROUPS": groups,
        "NUM_NODES": nodes,
        "NUM_GPUS": topology.num_gpus if topology.hierarchical else gpus,
        **padded,
        "SCRATCH": max(padded["REPLICAS"], padded["GROUPS"]) + 64,
        "IN_ROUNDS": gpus >= ROUNDS_FROM,
        "AT_ONCE": (topology.num_replicas - num_experts) // nodes >= AT_ONCE_FROM,
        "TAIL": policy.counts,
        "FIXUP_MOVES": fixup.moves if fixup else 0,
        "FIXUP_DONORS": fixup.donors if fixup else "top",
        "FIXUP_PEAK": fixup.peak if fixup else "others",
        "FIXUP_TIE": fixup.tie if fixup else "first",
        **_refine_fields("GROUP", policy.group_refine),
        "GPU_PACK": policy.gpu_pack,
        **_refine_fields("GPU", policy.gpu_refine),
        **_partition_fields(policy, groups, nodes, lanes),
        **_exchange_fields(policy, gpus, slots, lanes),
    }


def _partition_fields(policy: Policy, groups: int, nodes: int, lanes: int) -> dict[str, Any]:
    ways = len(partitions_to_try(groups, nodes)) if policy.group_pack == "partition" else 0
    proposers = min(max(1, nodes // PACKS_PER_PROPOSER), nodes // 2)
    return {
        "GROUP_PACK": policy.group_pack,
        "WAYS": ways,
        "WAY_LANES": max(lanes, triton.next_power_of_2(ways)),
        "GROUP_PROPOSERS": proposers,
        "GROUP_MEETINGS": _meetings(proposers, nodes, lanes),
    }


def _meetings(proposers: int, packs: int, lanes: int) -> int:
    """Meetings of a match round valued at once: all, or as many as registers hold, at least those of one proposer."""
    partners: int = triton.next_power_of_2(packs)
    all_of_them: int = partners * triton.next_power_of_2(max(1, proposers))
    return max(lanes, partners, min(MOST_MEETINGS, all_of_them))


def _partitions(topology: Topology, ways: int) -> Tensor:
    groups, nodes = topology.planned_groups, topology.planned_nodes
    table = partitions_to_try(groups, nodes) if ways else ()
    return torch.tensor(table, dtype=torch.int32).view(ways, groups)


def _exchange_fields(policy: Policy, gpus: int, slots: int, lanes: int) -> dict[str, Any]:
    paired = policy.fixup if isinstance(policy.fixup, Paired) else None
    exchange = policy.gpu_refine if isinstance(policy.gpu_refine, Exchange) else Exchange(0, 0)
    pairs = slots * (slots - 1) // 2
    proposers = min(max(exchange.proposers, gpus // PACKS_PER_PROPOSER), gpus // 2)
    partners = min(gpus - 1, exchange.candidates // (pairs * pairs)) if pairs else 0
    return {
        "PAIRED_MOVES": paired.moves if paired else 0,
        "PAIRED_DONORS": paired.donors if paired else 0,
        "PAIR_ROUNDS": exchange.pair_rounds,
        "MATCH_ROUNDS": exchange.match_rounds,
        "PROPOSERS": proposers,
        "MEETINGS": _meetings(proposers, gpus, lanes),
        "DOUBLE_STEPS": exchange.double_steps,
        "PARTNERS": partners,
        "CANDIDATES": max(lanes, triton.next_power_of_2(max(1, partners * pairs))),
    }


def _refine_fields(stage: str, choice: Nearest | Corner | Peak | Exchange | None) -> dict[str, Any]:
    names = {Nearest: "nearest", Corner: "corner", Peak: "peak", Exchange: "exchange", type(None): "none"}
    rule = names[type(choice)]
    steps, lights = getattr(choice, "steps", 0), getattr(choice, "lights", 0)
    return {f"{stage}_RULE": rule, f"{stage}_STEPS": steps, f"{stage}_LIGHTS": lights}


def _spec(function: Any, tensors: dict[str, str], shape: dict[str, Any], lanes: int) -> KernelSpec:
    constexprs = {name: shape[name] for name in function.arg_names if name in shape}
    signature = {name: "constexpr" if name in constexprs else tensors[name] for name in function.arg_names}
    num_warps = _num_warps(shape)
    registers = (168 if num_warps == 1 else 128) if lanes == 32 else None
    return KernelSpec(function, signature, constexprs, num_warps, registers)


def _num_warps(shape: dict[str, Any]) -> int:
    """One warp where a row is small: its steps wait for one another. Wide tiles (sorts, divisions) gain from more, and
    the packing step loses nothing: a tile of up to 32 packs is held, and reduced, by every warp."""
    if shape["GPU_RULE"] == "exchange" and shape["GPUS"] > 512:
        return 16  # with 8 a row of 1,024 GPUs spills 22 values
    width = max(shape["EXPERTS"], shape["GPUS"])
    return 1 if width <= 128 else 4 if width <= 512 else 8
