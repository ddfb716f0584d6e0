"""Kernels of a serving step as machine code, and their PTX run on the CPU. No test in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.compiled import TARGETS, Compiled, compile_kernel
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from bench.sass_cycles import GIGAHERTZ, estimate
from eplb_triton.kernels.serve_launch import HASHED_IDS, IDS, spec, split_shape

EXPERTS, TOKENS, K = 256, 4096, 8
INT64, INT32 = torch.int64, torch.int32

TYPES: dict[str, dict[str, torch.dtype | None]] = {
    "classify_layers": {"phy2log_ptr": INT64, "scratch_ptr": INT32, "classes_ptr": INT32},
    "split_layers": {
        "phy2log_ptr": INT64,
        "classes_ptr": INT32,
        "counts_ptr": INT32,
        "offsets_ptr": INT32,
        "scratch_ptr": INT32,
        "quotas_ptr": INT32,
    },
    "count_chunks": {"topk_ids_ptr": INT32, "counts_ptr": INT32},
    "route_exactly": {
        "topk_ids_ptr": INT32,
        "phy2log_ptr": INT64,
        "quotas_ptr": INT32,
        "offsets_ptr": INT32,
        "counts_ptr": INT32,
        "slots_ptr": INT32,
    },
    "route_by_hash": {
        "topk_ids_ptr": INT32,
        "phy2log_ptr": INT64,
        "quotas_ptr": INT32,
        "salt_ptr": None,
        "slots_ptr": INT32,
    },
    "fill_tables": {"phy2log_ptr": INT64, "quotas_ptr": INT32, "table_ptr": INT64},
    "add_ids": {"topk_ids_ptr": INT32, "ring_ptr": INT32, "position_ptr": INT64, "bad_ptr": INT32},
    "add_slots": {
        "tokens_ptr": INT32,
        "phy2log_ptr": INT64,
        "ring_ptr": INT32,
        "position_ptr": INT64,
        "bad_ptr": INT32,
    },
    "transfer_layers": {
        "ahead_ptr": INT64,
        "live_ptr": INT64,
        "source_ptr": INT32,
        "batch_ptr": INT32,
        "counts_ptr": INT32,
    },
}
CONSTANTS = {
    "count_chunks": {"IDS": IDS},
    "route_exactly": {"IDS": IDS},
    "route_by_hash": {"IDS": HASHED_IDS, "K": K},
    "add_ids": {"IDS": HASHED_IDS},
    "transfer_layers": {"GPUS_PER_NODE": 8},
}


def compiled(name: str, target: str, types: Mapping[str, torch.dtype | None], **sizes: int) -> Compiled:
    lanes = TARGETS[target].warp_size
    wanted = {"num_experts": EXPERTS, "num_replicas": 288, "num_gpus": 32} | sizes
    shape = split_shape(**wanted, lanes=lanes)
    return compile_kernel(spec(name, shape, tuple(types.items()), lanes=lanes, **CONSTANTS.get(name, {})), target)


class Ran(NamedTuple):
    found: dict[str, Tensor]
    microseconds: float


def run(
    name: str,
    programs: list[int],
    tensors: Mapping[str, Tensor | None],
    sizes: Mapping[str, int] | None = None,
    **numbers: int,
) -> Ran:
    """What a kernel compiled for sm_90 leaves in its tensors, and the estimated time of the slowest program."""
    types = {at: None if given is None else given.dtype for at, given in tensors.items()}
    kernel = compiled(name, "sm_90", types, **(sizes or {}))
    arrays: dict[str, Any] = {at: given.numpy() for at, given in tensors.items() if given is not None}
    memory = Memory(sum(array.nbytes + 1024 for array in arrays.values()) // 4 * 4 + 4096, 32 * kernel.num_warps)
    at = {argument: memory.own(array) for argument, array in arrays.items()} | numbers
    slowest = 0.0
    for program in programs:
        machine = Machine(kernel.ptx, kernel.num_warps)
        machine.run(memory, [at[argument] for argument in kernel.arguments] + [0, 0], (program, 0))
        slowest = max(slowest, estimate(kernel, machine).cycles / GIGAHERTZ / 1e3)
    left = {argument: torch.from_numpy(memory.tensor(at[argument], array)) for argument, array in arrays.items()}
    return Ran(left, slowest)


def poison(*shape: int, dtype: torch.dtype = INT32) -> Tensor:
    filled = torch.empty(shape, dtype=dtype)
    filled.numpy().view(np.uint8)[...] = 0xAB
    return filled
