"""Replanning from compiled PTX: every layer, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.ptx.compiled import Compiled
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from eplb_triton.kernels.replanning_launcher import NO_LIMIT, output_shapes, price_bits, workspace
from eplb_triton.kernels.replanning_shapes import ReplanPlan
from eplb_triton.topology import Topology


class Ran(NamedTuple):
    """What the kernel wrote, on the CPU, and the machine with its instruction counts."""

    outputs: dict[str, Tensor]
    machine: Machine


def run_replan(
    kernel: Compiled,
    plan: ReplanPlan,
    topology: Topology,
    history: Tensor,
    *,
    previous: Tensor | None,
    price: float,
    moves: int | None,
) -> Ran:
    """Replan `history` [n, L, E] float32 from `previous` [L, P] int64 with `kernel`, as compiled for `plan`.

    Raises:
        FaultError: a race, or an access out of bounds.
    """
    num_steps, num_layers, num_experts = history.shape
    width = plan.shape.log2phy_width
    shapes = output_shapes(topology, num_layers, num_experts, torch.int64, width if plan.want_log2phy else None)
    outputs = {name: torch.empty(shape, dtype=dtype).numpy() for name, (shape, dtype) in shapes.items()}
    scratch = {name: tensor.numpy() for name, tensor in workspace(plan.shape, num_layers, "cpu")._asdict().items()}
    for array in (outputs | scratch).values():
        array.view(np.uint8)[...] = 0xAB  # poison
    tensors = outputs | scratch | {"loads_ptr": history.contiguous().numpy()}
    tensors["partitions_ptr"] = plan.partitions.numpy()
    if previous is not None:
        tensors["previous_ptr"] = previous.numpy()
    memory = Memory(sum(array.nbytes + 1024 for array in tensors.values()) // 4 * 4 + 1024, 32 * kernel.num_warps)
    at = {name: memory.own(array) for name, array in tensors.items()}
    at |= {"step_stride": num_layers * num_experts, "layer_stride": num_experts, "expert_stride": 1}
    at |= {"log2phy_layer_stride": num_experts * width, "log2phy_stride": width}
    at |= {"num_steps": num_steps, "price_bits": price_bits(price), "moves": NO_LIMIT if moves is None else moves}
    machine = Machine(kernel.ptx, kernel.num_warps)
    for layer in range(num_layers):
        machine.run(memory, [at[name] for name in kernel.arguments] + [0, 0], (layer, 0))
    found = {name: torch.from_numpy(memory.tensor(at[name], array)) for name, array in outputs.items()}
    return Ran(found, machine)
