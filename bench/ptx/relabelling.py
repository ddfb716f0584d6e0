"""Relabelling from compiled PTX: every layer, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.ptx.compiled import TARGETS, Compiled, compile_kernel
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from eplb_triton.kernels.relabelling_launcher import RelabelShape, relabel_spec, scratch
from eplb_triton.topology import Topology


class Ran(NamedTuple):
    """What the kernel wrote, on the CPU, and the machine with its instruction counts."""

    maps: dict[str, Tensor]
    machine: Machine


def compile_relabelling(
    topology: Topology, num_experts: int, target: str, *, log2phy_width: int | None = None
) -> tuple[Compiled, RelabelShape]:
    """The kernel for int64 maps, as it is shipped, a function a stage."""
    warp = TARGETS[target].warp_size
    spec, shape = relabel_spec(topology, num_experts, log2phy_width=log2phy_width, warp=warp)
    return compile_kernel(spec, target), shape


def run_relabelling(
    kernel: Compiled, shape: RelabelShape, before: Tensor, planned: Tensor, *, want_log2phy: bool
) -> Ran:
    """Relabel `planned` [L, P] int64 for `before` [L, P] int64 with `kernel`, as compiled for `shape`.

    Raises:
        FaultError: a race, or an access out of bounds.
    """
    num_layers, width = len(planned), shape.log2phy_width
    sizes: dict[str, tuple[int, ...]] = {"phyrank": (shape.replicas,), "logcnt": (shape.experts,)}
    sizes |= {"log2phy": (shape.experts, width)} if want_log2phy else {}
    maps = {name: np.empty((num_layers, *size), np.int64) for name, size in sizes.items()}
    room = {name: tensor.numpy() for name, tensor in scratch(shape, num_layers, "cpu")._asdict().items()}
    for array in (maps | room).values():
        array.view(np.uint8)[...] = 0xAB  # poison
    maps |= {"phy2log": planned.numpy(), "bad": np.full((num_layers, shape.nodes), -1, np.int32)}
    tensors = maps | room | {"before_ptr": before.numpy()}
    memory = Memory(sum(array.nbytes + 1024 for array in tensors.values()) // 4 * 4 + 1024, 32 * kernel.num_warps)
    at = {name: memory.own(array) for name, array in tensors.items()}
    at |= {"log2phy_layer_stride": shape.experts * width, "log2phy_stride": width}
    machine = Machine(kernel.ptx, kernel.num_warps)
    for layer in range(num_layers):
        machine.run(memory, [at[name] for name in kernel.arguments] + [0, 0], (layer, 0))
    return Ran({name: torch.from_numpy(memory.tensor(at[name], array)) for name, array in maps.items()}, machine)
