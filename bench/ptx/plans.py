"""A whole plan from compiled PTX: every program of every kernel of the launch, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.ptx.compiled import Compiled
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from eplb_triton.kernels.specs import LaunchPlan
from eplb_triton.topology import Topology


class Ran(NamedTuple):
    """What the kernels wrote, int64 on the CPU, and the machines with their instruction counts."""

    maps: dict[str, Tensor]
    machines: Sequence[Machine]


def run_plan(
    kernels: Sequence[Compiled],
    launch: LaunchPlan,
    topology: Topology,
    weight: Tensor,
    *,
    programs: Sequence[tuple[int, int]] | None = None,
    machines: Sequence[Machine] = (),
) -> Ran:
    """Plan `weight` [L, E] float32 with `kernels`, as compiled for `launch`.

    Args:
        programs: the (layer, node) to run, all of them by default; the maps of others stay poison.
        machines: of an earlier run of `kernels`, to be used again.

    Raises:
        FaultError: a race, or an access out of bounds.
    """
    layers, experts = weight.shape
    replicas, nodes = topology.num_replicas, topology.planned_nodes
    shapes = {
        "phy2log": (layers, replicas),
        "phyrank": (layers, replicas),
        "logcnt": (layers, experts),
        "log2phy": (layers, experts, launch.shape.log2phy_width),
        "bad": (layers, nodes),
    }
    outputs = {name: np.empty(shape, np.int32 if name == "bad" else np.int64) for name, shape in shapes.items()}
    tensors = outputs | {"scratch_ptr": launch.scratch(layers, "cpu").numpy()}
    for array in tensors.values():
        array.view(np.uint8)[...] = 0xAB  # poison
    tensors |= {"loads_ptr": weight.numpy(), "partitions_ptr": launch.partitions("cpu").numpy()}
    threads = 32 * kernels[-1].num_warps
    memory = Memory(sum(array.nbytes + 1024 for array in tensors.values()) // 4 * 4 + 1024, threads)
    at = {name: memory.own(array) for name, array in tensors.items()}
    width = launch.shape.log2phy_width
    at |= {"layer_stride": experts, "expert_stride": 1, "num_rows": layers * nodes}
    at |= {"log2phy_layer_stride": experts * width, "log2phy_stride": width}
    machines = machines or [Machine(kernel.ptx, kernel.num_warps) for kernel in kernels]
    for kernel, machine in zip(kernels, machines, strict=True):
        # two more parameters, for scratch that a kernel may ask Triton for: these ask for none
        arguments = [at[name] for name in kernel.arguments] + [0, 0]
        for program in programs or list(np.ndindex(layers, nodes)):
            machine.run(memory, arguments, (program[0], program[1]))
    found = {name: memory.tensor(at[name], array) for name, array in outputs.items()}
    return Ran({name: torch.from_numpy(array).long() for name, array in found.items()}, machines)
