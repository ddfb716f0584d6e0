"""The sum over the steps of a history as compiled: the contract on five targets; its PTX, run on the CPU."""

from __future__ import annotations

import pytest
import torch
import triton

from bench.ptx.compiled import TARGETS, compile_kernel
from bench.ptx.contract import broken_rules
from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from eplb_triton.kernels.steps import steps_spec
from tests.sizes import chosen

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

TYPES = torch.float32, torch.bfloat16, torch.float64, torch.int64


@pytest.mark.parametrize("target", chosen(TARGETS, "sm_90", "gfx942"))
@pytest.mark.parametrize("dtype", chosen(TYPES, torch.float32, torch.float64))
def test_contract(dtype: torch.dtype, target: str) -> None:
    assert broken_rules(compile_kernel(steps_spec(300, dtype, TARGETS[target].warp_size), target)) == []


def test_sums() -> None:
    """In the order of the steps, the last group of experts not full; a load below 0 makes the sum no number."""
    random = torch.Generator().manual_seed(3)
    history = torch.rand(5, 2, 300, generator=random) ** 9 * 2.0**50
    history[3, 1, 7] = -1.0
    want = torch.zeros(2, 300, dtype=torch.float64)
    for step in history:
        want += step
    want[1, 7] = torch.nan
    total = torch.full((2, 300), -7.0).numpy()
    kernel = compile_kernel(steps_spec(300, torch.float32), "sm_90")
    memory = Memory((history.numel() + total.size) * 4 + 4096, 32 * kernel.num_warps)
    at = {"loads_ptr": memory.own(history.numpy()), "total_ptr": memory.own(total)}
    at |= {"step_stride": 600, "layer_stride": 300, "expert_stride": 1, "num_steps": 5}
    machine = Machine(kernel.ptx, kernel.num_warps)
    for program in ((0, 0), (0, 1), (1, 0), (1, 1)):
        machine.run(memory, [at[name] for name in kernel.arguments] + [0, 0], program)
    found = torch.from_numpy(memory.tensor(at["total_ptr"], total))
    assert torch.equal(found.nan_to_num(-1), want.float().nan_to_num(-1))
