# mypy: disable-error-code="import-untyped"
"""What the replanning kernel is compiled for, and where a layer's arrays lie: a function of the shape alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.constants import NEWEST_STEPS
from eplb_triton.kernels.arith import triton_version
from eplb_triton.kernels.buffers import ROW_BYTES
from eplb_triton.kernels.replanning import Memory, Outputs, replan_layers
from eplb_triton.kernels.replanning_counts import AT_ONCE
from eplb_triton.kernels.shapes import Shape, shape_of, starts_of
from eplb_triton.kernels.specs import TRITON_TYPE, KernelSpec, check_log2phy_width, check_sizes
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Policy, Replan
from eplb_triton.replans import score_z
from eplb_triton.topology import Topology

TOGETHER = 4
"""Samples that a lane loads at once: 16 bytes. With more, lanes share a row, and every sum takes shuffles."""


@dataclass(frozen=True)
class Places:
    """Where each array of a layer begins, in elements of its tensor of `Memory`."""

    # int32; rows of T samples lie as `sample_at` says
    sample: int  # [E, T] loads
    level: int  # [3, E, T] loads of a replica: as many replicas as there are, one fewer, one more
    sum: int  # [3, E] of them over the samples
    count: int  # [E] replicas
    share: int  # [E] of all steps used
    node: int  # [E]
    node_expert: int  # [N, E / N] experts of each node
    link: int  # [E + P] lists of slots
    first: int  # [E] place of an expert among all slots by expert
    last: int  # [E]
    listed: int  # [P] slots by expert
    rank: int  # [P]
    slot: int  # [P] expert in each slot
    before: int  # [P]
    moved: int  # [P]
    slot_sum: int  # [P] sum of the expert in each slot
    # bits of float32, for bounds
    inverse_count: int  # [3, E] 1 / replicas, of as many as `level` is of
    centred: int  # [E, T] loads of a replica, times T, less their sum
    given: int  # [P] what T * Q - M^2 + U would be if the GPU gave this slot away, but for the pair's term, or less
    product: int  # [S, E] 2 (T * sum of products - product of sums) of two experts
    into_own: int  # [E] what an expert adds to T * Q - M^2 + U of the heaviest GPU, or less
    into_partner: int  # [S, d] what one of the heaviest GPU adds to another GPU's, or less
    bound: int  # [S, (d - 1) * S] of swaps
    promising: int  # [S * p], at least swap_rows: swaps or new replicas that may be the best
    # of bounds of new replicas, as `value_changes` and `bound_replicas` say
    rise_sum: int  # [p]
    rise_variance: int  # [p]
    left_sum: int  # [p]
    left_variance: int  # [p]
    held_sum: int  # [S, d]
    held_variance: int  # [S, d]
    own_part: int  # [S]
    own_sum: int  # [S]
    own_variance: int  # [S]
    fall: int  # [S, p]
    received: int  # [S, p]
    falls: int  # [S, p]
    # int32 again
    fewer_power: int  # [p] of the GPU of a donor slot, with one replica fewer
    held_power: int  # [S, d] of a GPU that holds the receiver, with one replica more
    swap_power: int  # [2, swap_rows] powers of the heaviest GPU, then of the other one, after the most promising swaps
    times: int  # [P] how often its GPU holds the expert of a slot; 0: an earlier slot says it
    gpu_load: int  # [D, T]
    gpu_sum: int  # [D]
    gpu_power: int  # [D]
    step: int  # [steps] steps with loads
    held_at: int  # [S, d]
    changed: int  # [2 * P + D] GPUs, some of them twice
    donor: int  # [P]
    donor_at: int  # [P]
    donor_of: int  # [P] expert
    donor_first: int  # [E]
    donor_expert: int  # [E]
    donor_start: int  # [N + 1]
    shared: int  # [D, d] replicas that GPUs share
    order: int  # [D]
    partner: int  # [D]
    kept: int  # [2, P]
    placed: int  # [P]
    # int64
    spread: int  # [3, E] v
    gpu_spread: int  # [D] U
    gpu_variance: int  # [D] T * Q - M^2 + U
    inverse: int  # [T]
    grown: int  # [S, grown_row]
    lowered: int  # [S]
    numbers: int  # [8] bits of float64
    total: int  # [steps]
    first_plan: int  # memory of a row, as of `buffers`


@dataclass(frozen=True, repr=False)
class ReplanShape:
    """Everything that a kernel is compiled for. Its `repr` is part of the keys of Triton's caches, and of the name of
    every function of the kernel: with all fields in it, names were four fifths of the PTX."""

    experts: int
    replicas: int
    gpus: int
    nodes: int
    groups: int
    slots: int
    samples: int
    row: int  # T, of samples in memory: at least `samples`, the rest 0
    together: int  # samples that a lane loads at once
    newest_steps: int
    moves: int
    fresh_moves: int
    log2phy_width: int  # 1 if it is not wanted
    squarings: int  # log2 of the norm
    z: float
    z_of_slot: float
    lanes: int  # of tiles in which a lane makes products over the samples
    key_bits: int  # of (own slot, donor, receiving GPU)
    grown_row: int  # places for the replicas of an expert, more than any has
    partner_parts: int  # of the slots of the heaviest GPU, side by side in tiles of other GPUs
    partner_rows: int  # slots in a part, at least
    swap_rows: int  # of tiles of swaps or new replicas, by the samples
    ahead: int  # pieces of rows that a lane loads ahead: with more, AMD saves registers of the caller
    expert_lanes: int
    replica_lanes: int
    gpu_lanes: int
    slot_lanes: int
    group_lanes: int
    num_ints: int
    num_longs: int
    plan: Shape  # of a fresh plan
    at: Places

    def __repr__(self) -> str:
        return f"ReplanShape({self.experts}, {self.replicas}, {self.gpus}, {self._digest})"

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:24]


MAX_REGISTERS = {1: 240, 8: 176 if triton_version() >= (3, 7) else 200}
"""By warps, what a thread may take on NVIDIA: there are more registers than the programs of all layers need. With one
warp, a limit of 168 to 224 spills up to 40 bytes in one shape or another, 255 up to 16. With eight, 168 spills 8 bytes,
and from 192 on ptxas waits for one load after another in some stages, which take 4 % longer by estimate. Code of older
Tritons takes more: with 3.6, 176 spills 80 bytes, and 255 takes 8 % longer than 200."""


@dataclass(frozen=True)
class ReplanPlan:
    """How a shape is launched, on a grid of the layers."""

    shape: ReplanShape
    num_warps: int
    max_registers: int | None  # None: the target has no such option (AMD)
    partitions: Tensor  # int32 [ways, G] on the CPU
    want_log2phy: bool

    def kernel(
        self,
        *,
        previous: bool,
        loads_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.int64,
    ) -> KernelSpec:
        """The kernel for layers with a placement in force or without, and for these types of loads and maps."""
        index = "*" + TRITON_TYPE[dtype]
        outputs = Outputs(
            index,
            index,
            index,
            index if self.want_log2phy else "constexpr",
            "*i64",
            "*i64",
            "*fp64",
            "*fp64",
            "*i32",
            "*i32",
        )
        signature: dict[str, Any] = {
            "loads_ptr": "*" + TRITON_TYPE[loads_dtype],
            "step_stride": "i64",
            "layer_stride": "i64",
            "expert_stride": "i64",
            "num_steps": "i32",
            "previous_ptr": index if previous else "constexpr",
            "price_bits": "i64",
            "moves": "i32",
            "log2phy_layer_stride": "i64",
            "log2phy_stride": "i64",
            "partitions_ptr": "*i32",
            "workspace": Memory("*i32", "*i64"),
            "out": outputs,
            "shape": "constexpr",
        }
        names = list(signature)
        constexprs: dict[tuple[int, ...], Any] = {(names.index("shape"),): self.shape}
        if not previous:
            constexprs[(names.index("previous_ptr"),)] = None
        if not self.want_log2phy:
            constexprs[names.index("out"), Outputs._fields.index("log2phy")] = None
        return KernelSpec(replan_layers, signature, constexprs, self.num_warps, self.max_registers)

    @property
    def options(self) -> dict[str, Any]:
        """Compile and launch options, as of `KernelSpec`."""
        return self.kernel(previous=True).options


@lru_cache(maxsize=64)
def replan_plan(
    topology: Topology,
    num_experts: int,
    policy: Policy,
    *,
    steps: int,
    log2phy_width: int | None = None,
    warp: int = 32,
    wide: bool = False,
) -> ReplanPlan:
    """How layers of `num_experts` are replanned; a function of the shape alone, needs no GPU.

    Args:
        topology: counts of the cluster.
        num_experts: E.
        policy: one with `replan`.
        steps: most steps of a history.
        log2phy_width: last dimension of log2phy, None if it is not filled; P - E + 1 holds any plan.
        warp: threads of a warp, 32 or (AMD) 64.
        wide: tiles as wide as their loops, which Triton's interpreter takes least time for.

    Raises:
        ValueError: `policy` does not replan, or a count is none that the kernel takes.
    """
    rule = policy.replan
    if rule is None:
        raise ValueError(f"policy={policy.name!r} does not replan; one with `replan`, like 'steady', does")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    check_log2phy_width(log2phy_width)
    topology.check_experts(num_experts)
    check_sizes(topology, num_experts)
    steps = min(steps, NEWEST_STEPS)
    groups, nodes = topology.planned_groups, topology.planned_nodes
    width = max(num_experts, topology.num_replicas)
    num_warps = 1 if width <= 64 else 8
    threads = warp * num_warps
    flat = triton.next_power_of_2(max(topology.replicas_per_node * topology.slots_per_gpu, 32 * topology.num_gpus))
    row = _row(rule)
    lanes = max(threads, min(flat, 4096)) if wide else threads
    parts = min(topology.slots_per_gpu, max(1, lanes // topology.gpus_per_node))
    sizes = _sizes(topology, num_experts, rule, warp)
    plan = shape_of(topology, num_experts, policy, 1, warp)
    at, totals = _places(topology, num_experts, rule, steps, lanes // row, plan.scratch)
    z = score_z(topology.num_gpus, rule.z)
    shape = ReplanShape(
        num_experts, topology.num_replicas, topology.num_gpus, nodes, groups, topology.slots_per_gpu,
        rule.samples, row, row if wide else min(row, TOGETHER), NEWEST_STEPS,
        rule.moves, rule.fresh_moves, log2phy_width or 1, rule.norm.bit_length() - 1,
        z, z / math.sqrt(topology.slots_per_gpu),
        lanes=lanes,
        key_bits=(topology.replicas_per_node * num_experts - 1).bit_length(),
        grown_row=_grown_row(topology),
        partner_parts=parts,
        partner_rows=triton.next_power_of_2(-(-topology.slots_per_gpu // parts)),
        swap_rows=lanes // row,
        ahead=8 if warp == 32 else 2,
        **sizes,
        num_ints=totals[0], num_longs=totals[1], plan=plan, at=at,
    )  # fmt: skip
    registers = MAX_REGISTERS[num_warps] if warp == 32 else None
    ways = plan.partition.ways if nodes > 1 else 0
    table = partitions_to_try(groups, nodes) if ways else ()
    partitions = torch.tensor(table, dtype=torch.int32, device="cpu").view(ways, groups)
    return ReplanPlan(shape, num_warps, registers, partitions, log2phy_width is not None)


def _row(rule: Replan) -> int:
    return max(4, int(triton.next_power_of_2(rule.samples)))


def _grown_row(topology: Topology) -> int:
    at_once: int = AT_ONCE.value
    return -(-topology.replicas_per_node // at_once) * at_once


def _sizes(topology: Topology, num_experts: int, rule: Replan, warp: int) -> dict[str, int]:
    pads = {
        "expert_lanes": num_experts,
        "replica_lanes": topology.num_replicas,
        "gpu_lanes": topology.num_gpus,
        "slot_lanes": topology.slots_per_gpu,
        "group_lanes": topology.planned_groups,
    }
    return {name: max(warp, triton.next_power_of_2(size)) for name, size in pads.items()}


def _places(
    topology: Topology, num_experts: int, rule: Replan, steps: int, swap_rows: int, scratch: int
) -> tuple[Places, tuple[int, int]]:
    """Where arrays begin, multiples of 4 elements; and how long the two tensors of a layer are."""
    E, P, D, T = num_experts, topology.num_replicas, topology.num_gpus, _row(rule)  # noqa: N806
    S, p, d = topology.slots_per_gpu, topology.replicas_per_node, topology.gpus_per_node  # noqa: N806
    ints = {
        "sample": T * E, "level": 3 * T * E, "sum": 3 * E, "count": E, "share": E, "node": E, "node_expert": E,
        "link": E + P, "first": E, "last": E, "listed": P, "rank": P, "slot": P, "before": P, "moved": P,
        "slot_sum": P, "centred": T * E, "given": P, "product": S * E, "into_own": E, "into_partner": S * d,
        "bound": S * (d - 1) * S, "promising": max(S * p, swap_rows), "swap_power": 2 * swap_rows, "times": P,
        "gpu_load": T * D, "gpu_sum": D, "gpu_power": D, "step": steps,
        "held_at": S * d, "changed": 2 * P + D, "donor": P, "donor_at": P, "donor_of": P, "donor_first": E,
        "donor_expert": E, "donor_start": topology.planned_nodes + 1, "fewer_power": p, "held_power": S * d,
        "inverse_count": 3 * E, "rise_sum": p, "rise_variance": p, "left_sum": p, "left_variance": p,
        "held_sum": S * d, "held_variance": S * d, "own_part": S, "own_sum": S, "own_variance": S,
        "fall": S * p, "received": S * p, "falls": S * p,
        "shared": D * d, "order": D, "partner": D, "kept": 2 * P, "placed": P,
    }  # fmt: skip
    longs = {
        "spread": 3 * E, "gpu_spread": D, "gpu_variance": D, "inverse": T,
        "grown": S * _grown_row(topology),
        "lowered": S, "numbers": 8, "total": steps,
        "first_plan": ROW_BYTES.value * scratch // 8,
    }  # fmt: skip
    int_starts, num_ints = starts_of(ints)
    long_starts, num_longs = starts_of(longs)
    return Places(**int_starts, **long_starts), (num_ints, num_longs)
