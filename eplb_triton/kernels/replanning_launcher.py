# mypy: disable-error-code="import-untyped"
"""The launcher of replanning: everything that waits, compiles or allocates is done once, when it is made."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.kernels.replanning import Memory, Outputs, replan_layers
from eplb_triton.kernels.specs import PACKS_PER_PROPOSER, TRITON_TYPE, _meetings, _partitions
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Policy, Replan
from eplb_triton.replans import NEWEST_STEPS, score_z
from eplb_triton.topology import Topology

AT_ONCE_FROM = 128
"""Redundant replicas a row from which D'Hondt picks by threshold; below, a step each is faster to compile."""
TOGETHER = 4
"""Samples that a lane loads at once: 16 bytes. With more, lanes share a row, and every sum takes shuffles."""
NO_LIMIT = 0x7FFFFFFF
_INTERPRETED = not isinstance(replan_layers, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Places:
    """Where each array of a layer begins, in elements of its tensor of `Memory`."""

    # int32
    sample: int  # [E, T] loads
    level: int  # [3, E, T] loads of a replica: as many replicas as there are, one fewer, one more
    sum: int  # [3, E] of them over the samples
    count: int  # [E] replicas
    share: int  # [E] of all steps used
    node: int  # [E]
    link: int  # [E + P] lists of slots
    slot: int  # [P] expert in each slot
    before: int  # [P]
    moved: int  # [P]
    times: int  # [P] how often its GPU holds the expert of a slot; 0: an earlier slot says it
    gpu_load: int  # [D, T]
    gpu_sum: int  # [D]
    gpu_power: int  # [D]
    slot_sum: int  # [p]
    step: int  # [steps] steps with loads
    holder: int  # [p]
    held_at: int  # [S, d]
    own_at: int  # [p]
    changed: int  # [2 * P + D] GPUs, some of them twice
    donor: int  # [p]
    receiver: int  # [S]
    shared: int  # [D, d] replicas that GPUs share
    taken: int  # [D]
    order: int  # [D]
    partner: int  # [D]
    kept: int  # [2, P]
    placed: int  # [P]
    logical: int  # [e]
    expert: int  # [p] of each replica of the list
    rank: int  # [p]
    fixed: int  # [p] or [G]
    item_at: int  # [p] or [G]
    spare: int  # [p]
    state: int  # [5, G]
    # int64
    square: int  # [3, E] sums of squares of `level`
    spread: int  # [3, E] v
    own_product: int  # [P]
    gpu_bend: int  # [D] T * Q + U
    gpu_spread: int  # [D] U
    product: int  # [S, p]
    into_own: int  # [p]
    from_partner: int  # [p]
    into_partner: int  # [S, d]
    out_of_own: int  # [S]
    held_power: int  # [P]
    change_square: int  # [P]
    lowered: int  # [S]
    donor_bend: int  # [P]
    receiving_bend: int  # [P]
    worth: int  # [P]
    fall: int  # [S, p]
    received: int  # [S, p]
    numbers: int  # [4] bits of float64
    total: int  # [steps]
    sorted: int  # [p] or [G]
    # float32
    weights: int  # [e] or [G]
    average: int  # [e]
    loads: int  # [p]


@dataclass(frozen=True)
class ReplanShape:
    """Everything that a kernel is compiled for."""

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
    squarings: int  # log2 of the norm
    z: float
    z_of_slot: float
    lanes: int  # of tiles in which a lane makes products over the samples
    candidates: int  # of tiles of candidates
    expert_lanes: int
    gpu_lanes: int
    slot_lanes: int
    group_lanes: int
    node_lanes: int
    row_experts: int
    row_replicas: int
    row_gpus: int
    at_once: bool
    ways: int
    way_lanes: int
    proposers: int
    meetings: int
    num_ints: int
    num_longs: int
    num_floats: int
    at: Places


@dataclass(frozen=True)
class ReplanPlan:
    """How a shape is launched, on a grid of the layers."""

    shape: ReplanShape
    num_warps: int
    max_registers: int | None  # None: the target has no such option (AMD)
    partitions: Tensor  # int32 [ways, G] on the CPU

    @property
    def options(self) -> dict[str, Any]:
        """Compile and launch options. Contraction off: every operation rounds once."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options


@lru_cache(maxsize=64)
def replan_plan(
    topology: Topology, num_experts: int, policy: Policy, *, steps: int, warp: int = 32, wide: bool = False
) -> ReplanPlan:
    """How layers of `num_experts` are replanned; a function of the shape alone, needs no GPU.

    Args:
        topology: counts of the cluster.
        num_experts: E.
        policy: one with `replan`.
        steps: most steps of a history.
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
    topology.check_experts(num_experts)
    steps = min(steps, NEWEST_STEPS)
    groups, nodes = topology.planned_groups, topology.planned_nodes
    width = max(num_experts, topology.num_replicas)
    num_warps = 1 if width <= 64 else 8
    threads = warp * num_warps
    flat = triton.next_power_of_2(max(topology.replicas_per_node * topology.slots_per_gpu, 32 * topology.num_gpus))
    row = _row(rule)
    sizes = _sizes(topology, num_experts, rule, warp)
    at, totals = _places(sizes, topology, num_experts, rule, steps)
    ways = len(partitions_to_try(groups, nodes)) if nodes > 1 else 0
    proposers = min(max(1, nodes // PACKS_PER_PROPOSER), nodes // 2)
    z = score_z(topology.num_gpus, rule.z)
    shape = ReplanShape(
        num_experts, topology.num_replicas, topology.num_gpus, nodes, groups, topology.slots_per_gpu,
        rule.samples, row, row if wide else min(row, TOGETHER), NEWEST_STEPS, rule.moves, rule.fresh_moves, rule.norm.bit_length() - 1,
        z, z / math.sqrt(topology.slots_per_gpu),
        lanes=max(threads, min(flat, 4096)) if wide else threads,
        candidates=max(threads, min(flat, 4096)) if wide else 2 * threads,
        **sizes,
        at_once=(topology.num_replicas - num_experts) // nodes >= AT_ONCE_FROM,
        ways=ways, way_lanes=max(warp, triton.next_power_of_2(ways)),
        proposers=proposers, meetings=_meetings(proposers, nodes, warp),
        num_ints=totals[0], num_longs=totals[1], num_floats=totals[2], at=at,
    )  # fmt: skip
    registers = {1: 168, 8: 168}[num_warps] if warp == 32 else None
    return ReplanPlan(shape, num_warps, registers, _partitions(topology, ways))


def _row(rule: Replan) -> int:
    return max(4, triton.next_power_of_2(rule.samples))


def _sizes(topology: Topology, num_experts: int, rule: Replan, warp: int) -> dict[str, int]:
    pads = {
        "expert_lanes": num_experts,
        "gpu_lanes": topology.num_gpus,
        "slot_lanes": topology.slots_per_gpu,
        "group_lanes": topology.planned_groups,
        "node_lanes": topology.planned_nodes,
        "row_experts": num_experts // topology.planned_nodes,
        "row_replicas": topology.replicas_per_node,
        "row_gpus": topology.gpus_per_node,
    }
    return {name: max(warp, triton.next_power_of_2(size)) for name, size in pads.items()}


def _places(
    sizes: dict[str, int], topology: Topology, num_experts: int, rule: Replan, steps: int
) -> tuple[Places, tuple[int, int, int]]:
    """Where arrays begin, multiples of 4 elements; and how long the three tensors of a layer are."""
    E, P, D, T = num_experts, topology.num_replicas, topology.num_gpus, _row(rule)  # noqa: N806
    S, p, d = topology.slots_per_gpu, topology.replicas_per_node, topology.gpus_per_node  # noqa: N806
    row = max(sizes["row_replicas"], sizes["row_experts"], sizes["group_lanes"]) + 64
    ints = {
        "sample": T * E, "level": 3 * T * E, "sum": 3 * E, "count": E, "share": E, "node": E, "link": E + P,
        "slot": P, "before": P, "moved": P, "times": P, "gpu_load": T * D, "gpu_sum": D, "gpu_power": D, "slot_sum": p, "step": steps,
        "holder": p, "held_at": S * d, "own_at": p, "changed": 2 * P + D, "donor": p, "receiver": S, "shared": D * d, "taken": D, "order": D,
        "partner": D, "kept": 2 * P, "placed": P, "logical": row, "expert": row, "rank": row, "fixed": row,
        "item_at": row, "spare": row, "state": 5 * sizes["group_lanes"],
    }  # fmt: skip
    longs = {
        "square": 3 * E, "spread": 3 * E, "own_product": P, "gpu_bend": D, "gpu_spread": D,
        "product": S * p, "into_own": p, "from_partner": p, "into_partner": S * d, "out_of_own": S, "held_power": P,
        "change_square": P, "lowered": S, "donor_bend": P, "receiving_bend": P, "worth": P, "fall": S * p,
        "received": S * p, "numbers": 4, "total": steps, "sorted": row,
    }  # fmt: skip
    floats = {"weights": row, "average": row, "loads": row}
    starts: dict[str, int] = {}
    totals = []
    for arrays in (ints, longs, floats):
        end = 0
        for name, size in arrays.items():
            starts[name] = end
            end += -(-size // 4) * 4
        totals.append(end)
    return Places(**starts), (totals[0], totals[1], totals[2])


def price_bits(price: float) -> int:
    """The bits of a float64 as int64: Triton takes a Python float for a float32."""
    return int(struct.unpack("<q", struct.pack("<d", price))[0])


class ReplanLaunch:
    """Replanning on a GPU, made once: a call fills tensors that are there, on the current stream, and waits for nothing.

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
        self.shapes = _output_shapes(topology, num_layers, num_experts, dtype)
        if not want_log2phy:
            del self.shapes["log2phy"]
        self._history_shape = (num_layers, num_experts)
        self._workspace = _workspace(self.plan.shape, num_layers, self.device)
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
            self._workspace, out, self.plan.shape,
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
            replan_layers.warmup(*arguments, grid=(1,), **self.plan.options)


def _output_shapes(
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


def _workspace(shape: ReplanShape, num_layers: int, device: torch.device | str) -> Memory:
    return Memory(
        torch.empty((num_layers, shape.num_ints), dtype=torch.int32, device=device),
        torch.empty((num_layers, shape.num_longs), dtype=torch.int64, device=device),
        torch.empty((num_layers, shape.num_floats), dtype=torch.float32, device=device),
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
