# mypy: disable-error-code="import-untyped"
"""What is launched for the kernels of a serving step: shapes, constants, options, scratch. Needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from eplb_triton.kernels import serve
from eplb_triton.kernels.launcher import Pointer, load_kernel, run_on
from eplb_triton.kernels.specs import TRITON_TYPE, WARP, KernelSpec
from eplb_triton.serving.checks import check

IDS = 512  # of a program that counts and sorts them; half as many cost as much again for the places
HASHED_IDS = 1024  # of one that does not sort
MOST_SOURCES = 16384  # 3 * 16384^2, a key of kernels/transfers.py, is below 2^31
_INTERPRETED = not isinstance(serve.split_layers, triton.runtime.JITFunction)


@dataclass(frozen=True)
class SplitShape:
    """Sizes of a placement, and padded to powers of two of at least a warp."""

    num_experts: int
    num_replicas: int
    num_gpus: int
    slots: int  # of a GPU
    experts: int
    replicas: int
    gpus: int
    class_scratch: int  # int32 a layer, of `classify_layers`


@lru_cache(maxsize=256)
def split_shape(num_experts: int, num_replicas: int, num_gpus: int, lanes: int = WARP) -> SplitShape:
    """The constants of every kernel for one placement."""
    experts, replicas, gpus = (
        max(lanes, triton.next_power_of_2(size)) for size in (num_experts, num_replicas, num_gpus)
    )
    masks = -(-num_experts // 32) * gpus
    return SplitShape(
        num_experts, num_replicas, num_gpus, num_replicas // num_gpus, experts, replicas, gpus, experts + masks
    )


@lru_cache(maxsize=256)
def spec(
    name: str,
    shape: SplitShape,
    types: tuple[tuple[str, torch.dtype | None], ...],
    lanes: int = WARP,
    **constants: int,
) -> KernelSpec:
    """A kernel of `serve`, for tensors of these types.

    Args:
        name: of the kernel.
        shape: its constants.
        types: dtype of each tensor argument by name, None for one that is absent.
        lanes: threads of a warp.
        constants: the other constants by name.
    """
    function: Any = getattr(serve, name)
    absent = {argument: None for argument, dtype in types if dtype is None}
    fixed: dict[str, Any] = {"shape": shape, "NUM_EXPERTS": shape.num_experts, **constants, **absent}
    constexprs: dict[tuple[int, ...], Any] = {
        (place,): fixed[argument] for place, argument in enumerate(function.arg_names) if argument in fixed
    }
    pointers = {argument: f"*{TRITON_TYPE[dtype]}" for argument, dtype in types if dtype is not None}
    signature = {
        argument: "constexpr" if argument in fixed else pointers.get(argument, "i32") for argument in function.arg_names
    }
    num_warps = _num_warps(name, shape, lanes)
    return KernelSpec(function, signature, constexprs, num_warps, 128 if lanes == 32 else None)


def classify(phy2log: Tensor, num_gpus: int, classes: Tensor) -> None:
    """Fill `classes` [L, E] int32 on the current stream; allocates its scratch, see `ClassLaunch`."""
    num_layers, num_experts = classes.shape
    shape = split_shape(num_experts, phy2log.shape[1], num_gpus)
    scratch = torch.empty(num_layers, shape.class_scratch, dtype=torch.int32, device=phy2log.device)
    tensors = {"phy2log_ptr": phy2log, "scratch_ptr": scratch, "classes_ptr": classes}
    _run("classify_layers", num_layers, shape, tensors)


class ClassLaunch:
    """`classify` for placements of one shape on one device: compiled, loaded and allocated here, nothing later.

    Args:
        num_layers: L.
        num_experts: E.
        num_replicas: P.
        num_gpus: D.
        dtype: of the slot maps, torch.int64 or torch.int32.
        device: a GPU; in Triton's interpreter any device whose memory NumPy can see.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_replicas: int,
        num_gpus: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = split_shape(num_experts, num_replicas, num_gpus)
        self.scratch = torch.empty(num_layers, shape.class_scratch, dtype=torch.int32, device=device)
        self._index, self._shape = device.index, shape
        types = ("phy2log_ptr", dtype), ("scratch_ptr", torch.int32), ("classes_ptr", torch.int32)
        kernel, grid = spec("classify_layers", shape, types), (num_layers, 1, 1)
        sizes = num_layers * num_replicas, self.scratch.numel(), num_layers * num_experts
        stand_ins = [Pointer(f"*{TRITON_TYPE[kind]}", size) for (_, kind), size in zip(types, sizes, strict=True)]
        self._run = load_kernel(kernel.function, grid, [*stand_ins, shape], kernel.options, device)

    def __call__(self, phy2log: Tensor, classes: Tensor) -> None:
        """Fill `classes` [L, E] int32 from `phy2log` [L, P] on the current stream of the device; not checked here."""
        run_on(self._index, self._run, phy2log, self.scratch, classes, self._shape)


def split(
    phy2log: Tensor,
    classes: Tensor,
    counts: Tensor,
    num_gpus: int,
    rounds: int,
    rank: int,
    quotas: Tensor,
    offsets: Tensor | None,
    scratch: Tensor,
) -> None:
    """Fill `quotas` [L, P] and, of counts [ranks, L, E], `offsets` [L, E]; checked by the caller."""
    num_layers, num_experts = classes.shape
    if counts.dtype not in TRITON_TYPE:
        counts = counts.to(torch.float32 if counts.is_floating_point() else torch.int64)
    shape = split_shape(num_experts, phy2log.shape[1], num_gpus)
    tensors = {
        "phy2log_ptr": phy2log,
        "classes_ptr": classes,
        "counts_ptr": counts,
        "offsets_ptr": offsets,
        "scratch_ptr": scratch,
        "quotas_ptr": quotas,
    }
    ranks = counts.shape[0] if counts.dim() == 3 else 1
    _run("split_layers", num_layers, shape, tensors, num_layers, ranks, rank, rounds)


def chunks(num_ids: int) -> int:
    """Programs that count and sort so many ids."""
    return -(-num_ids // IDS)


def route(
    topk_ids: Tensor,
    layer: int,
    quotas: Tensor,
    phy2log: Tensor,
    num_experts: int,
    num_gpus: int,
    offsets: Tensor | None,
    salt: int | Tensor,
    slots: Tensor,
    workspace: Tensor | None,
) -> None:
    """Fill `slots` [tokens, k]: exact with offsets [L, E], else by a hash; checked by the caller, but for the scratch.

    Raises:
        ValueError: the workspace is too small or none, or the salt is no int32 tensor of one element.
    """
    num_ids, shape = topk_ids.numel(), split_shape(num_experts, phy2log.shape[1], num_gpus)
    if offsets is None:
        if isinstance(salt, Tensor):
            check("salt", salt, (1,), (torch.int32,), topk_ids.device)
        number = 0 if isinstance(salt, Tensor) else (int(salt) + (1 << 31)) % (1 << 32) - (1 << 31)
        tensors: dict[str, Tensor | None] = {"topk_ids_ptr": topk_ids, "phy2log_ptr": phy2log, "quotas_ptr": quotas}
        tensors |= {"salt_ptr": salt if isinstance(salt, Tensor) else None, "slots_ptr": slots}
        grid = -(-num_ids // HASHED_IDS)
        _run("route_by_hash", grid, shape, tensors, num_ids, layer, number, IDS=HASHED_IDS, K=topk_ids.shape[1])
        return
    if workspace is None:
        workspace = torch.empty(chunks(num_ids), num_experts, dtype=torch.int32, device=topk_ids.device)
    elif workspace.shape[0] < chunks(num_ids):
        raise ValueError(
            f"workspace has {workspace.shape[0]} rows, must have {chunks(num_ids)} for {num_ids} ids; "
            "slots_workspace makes one for the most tokens of a step"
        )
    check("workspace", workspace, (workspace.shape[0], num_experts), (torch.int32,), topk_ids.device)
    tensors = {"topk_ids_ptr": topk_ids, "counts_ptr": workspace}
    _run("count_chunks", chunks(num_ids), shape, tensors, num_ids, IDS=IDS)
    tensors = {"topk_ids_ptr": topk_ids, "phy2log_ptr": phy2log, "quotas_ptr": quotas, "offsets_ptr": offsets}
    tensors |= {"counts_ptr": workspace, "slots_ptr": slots}
    _run("route_exactly", chunks(num_ids), shape, tensors, num_ids, layer, IDS=IDS)


def tabulate(phy2log: Tensor, quotas: Tensor, num_gpus: int, table: Tensor) -> None:
    """Fill `table` [L, E, M]; checked by the caller."""
    num_layers, num_experts, width = table.shape
    shape = split_shape(num_experts, phy2log.shape[1], num_gpus)
    tensors = {"phy2log_ptr": phy2log, "quotas_ptr": quotas, "table_ptr": table}
    _run("fill_tables", num_layers, shape, tensors, width)


def transfer(
    ahead: Tensor, live: Tensor, num_experts: int, num_gpus: int, gpus_per_node: int, out: Sequence[Tensor]
) -> None:
    """Fill `out`: source [L, P], batch [L, P] and counts [L, 5]; checked by the caller, but for the size.

    Raises:
        ValueError: there are more replicas than a key of 32 bits has room for.
    """
    num_layers, num_replicas = ahead.shape
    if num_replicas > MOST_SOURCES:
        raise ValueError(
            f"num_replicas={num_replicas} must be at most {MOST_SOURCES} for backend 'triton'; 'cpu' has no limit"
        )
    shape = split_shape(num_experts, num_replicas, num_gpus)
    source, batch, counts = out
    tensors = {"ahead_ptr": ahead, "live_ptr": live, "source_ptr": source, "batch_ptr": batch, "counts_ptr": counts}
    _run("transfer_layers", num_layers, shape, tensors, GPUS_PER_NODE=gpus_per_node)


def add_ids(topk_ids: Tensor, layer: int, ring: Tensor, position: Tensor, bad: Tensor) -> None:
    """Count `topk_ids` into `layer` of the ring [n, L, E] at `position`."""
    shape = split_shape(ring.shape[2], 1, 1)
    tensors = {"topk_ids_ptr": topk_ids, "ring_ptr": ring, "position_ptr": position, "bad_ptr": bad}
    grid = -(-topk_ids.numel() // HASHED_IDS)
    _run("add_ids", grid, shape, tensors, topk_ids.numel(), layer, ring.shape[1], IDS=HASHED_IDS)


def add_slots(tokens: Tensor, phy2log: Tensor, ring: Tensor, position: Tensor, bad: Tensor) -> None:
    """Add tokens of slots [L, P] to the experts of the ring [n, L, E] at `position`."""
    shape = split_shape(ring.shape[2], phy2log.shape[1], 1)
    tensors = {"tokens_ptr": tokens, "phy2log_ptr": phy2log, "ring_ptr": ring, "position_ptr": position, "bad_ptr": bad}
    _run("add_slots", phy2log.shape[0], shape, tensors, ring.shape[1])


def _run(
    name: str,
    grid: int,
    shape: SplitShape,
    tensors: Mapping[str, Tensor | None],
    *numbers: int,
    **constants: int,
) -> None:
    """Launch a kernel of `serve` on the current stream: its tensors in order, then its integers."""
    given = list(tensors.values())
    first = given[0]
    assert first is not None
    if not first.is_cuda and not _INTERPRETED:
        raise ValueError(f"the tensors are on {first.device}, must be on a GPU for backend 'triton'; use .cuda()")
    if grid == 0:
        return
    types = tuple((argument, None if tensor is None else tensor.dtype) for argument, tensor in tensors.items())
    kernel = spec(name, shape, types, **constants)
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.get_device()):
            kernel.function[(grid,)](*given, *numbers, **_keywords(kernel))
    else:
        kernel.function[(grid,)](*given, *numbers, **_keywords(kernel))


def _keywords(kernel: KernelSpec) -> dict[str, Any]:
    """What a launch passes by name: constants and options. An absent pointer is passed by place, as the others."""
    names = kernel.function.arg_names
    constants = {names[place[0]]: value for place, value in kernel.constexprs.items() if value is not None}
    return constants | kernel.options


def _num_warps(name: str, shape: SplitShape, lanes: int) -> int:
    """Slots and experts are wide, GPUs few: with 8 warps the lists before the rounds of DeepSeek-V3 take 3,000 cycles,
    with 4 they take 4,500. What a small tile of GPUs costs more, every warp doing the same, is nothing."""
    if name == "classify_layers":
        return max(1, min(8, shape.gpus // lanes))  # a step for every expert, over GPUs
    if name == "transfer_layers" and shape.replicas <= 512:
        return 1  # a step for every slot that is written: two reductions, which between warps cost two barriers each
    return max(1, min(8 if shape.replicas <= 1024 else 16, max(shape.replicas, shape.experts) // lanes))
