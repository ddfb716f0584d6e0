"""The kernels of a serving step at DeepSeek-V3's size, and their PTX run on the CPU. No test in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.ptx.compiled import Compiled
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from bench.ptx.sass_cycles import GIGAHERTZ, estimate
from bench.ptx.serving import compile_serving

EXPERTS, TOKENS, K = 256, 4096, 8
INT64, INT32 = torch.int64, torch.int32


def compiled(name: str, target: str, types: Mapping[str, torch.dtype | None], **sizes: int) -> Compiled:
    wanted = {"num_experts": EXPERTS, "num_replicas": 288, "num_gpus": 32} | sizes
    return compile_serving(name, target, types, top_k=K, **wanted)


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
