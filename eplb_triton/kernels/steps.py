"""The loads of a history added up, for policies that plan for their sum: a kernel and its launcher."""
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_triton.kernels.arith import clean
from eplb_triton.kernels.launcher import Pointer, load_kernel, run_on
from eplb_triton.kernels.specs import TRITON_TYPE, WARP, KernelSpec

LANES = 256  # experts of a program; 4 warps: a lane has two chains of additions
_STRIDES = "step_stride", "layer_stride", "expert_stride", "num_steps"


@triton.jit(do_not_specialize=["loads_ptr", *_STRIDES])
def sum_steps(
    loads_ptr,  # any real dtype [num_steps, L, E], tokens per expert, oldest step first
    step_stride: tl.int64,
    layer_stride: tl.int64,
    expert_stride: tl.int64,
    num_steps: tl.int32,
    total_ptr,  # float32 [L, E], out: NaN where a load was bad
    NUM_EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = expert < NUM_EXPERTS
    loads_ptr += layer * layer_stride + expert * expert_stride
    total = tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.int32)
    step = tl.full((), 0, tl.int32)
    while step < num_steps:
        load, its_bad = clean(tl.load(loads_ptr + step * step_stride, mask=inside, other=0))
        total += load.to(tl.float64)
        bad = bad | its_bad.to(tl.int32)
        step += 1
    tl.store(
        total_ptr + layer * NUM_EXPERTS + expert, tl.where(bad != 0, float("nan"), total.to(tl.float32)), mask=inside
    )


def steps_spec(num_experts: int, loads_dtype: torch.dtype, warp: int = 32) -> KernelSpec:
    """The kernel for histories of that many experts and that type."""
    names: list[str] = sum_steps.arg_names
    constants = {"NUM_EXPERTS": num_experts, "LANES": LANES}
    kinds = {"loads_ptr": "*" + TRITON_TYPE[loads_dtype], "total_ptr": "*fp32", "num_steps": "i32"}
    signature: dict[str, Any] = {name: "constexpr" if name in constants else kinds.get(name, "i64") for name in names}
    constexprs: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in constants.items()}
    return KernelSpec(sum_steps, signature, constexprs, LANES // 2 // warp, 128 if warp == 32 else None)


class StepsLaunch:
    """Sums over the steps of histories on one device: compiled, loaded and allocated here, nothing later.

    Args:
        num_layers: L.
        num_experts: E.
        loads_dtype: of the histories.
        device: a GPU; in Triton's interpreter any device whose memory NumPy can see.
    """

    def __init__(self, num_layers: int, num_experts: int, loads_dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.empty(num_layers, num_experts, dtype=torch.float32, device=device)
        self._index, self._num_experts = device.index, num_experts
        kernel = steps_spec(num_experts, loads_dtype, WARP)
        stand_ins = Pointer(kernel.signature["loads_ptr"], 1), 1, 1, 1, 1, self.total, num_experts, LANES
        grid = num_layers, -(-num_experts // LANES), 1
        self._run = load_kernel(kernel.function, grid, stand_ins, kernel.options, device)

    def __call__(self, history: Tensor) -> Tensor:
        """[L, E] float32, the same tensor for every call: the loads of history [n, L, E], any strides, each rounded to
        float32, added in float64, oldest first, and rounded once; NaN, a bad load too, where one of them is bad."""
        run_on(
            self._index, self._run, history, *history.stride(), len(history), self.total, self._num_experts, LANES
        )  # fmt: skip
        return self.total
