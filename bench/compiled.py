"""Kernels compiled for machines that are not there, and what the toolchain made of them: PTX, SASS, AMD assembly.

Nothing here needs a GPU: Triton's wheel carries ptxas, nvdisasm and cuobjdump, and compiles for AMD by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.cases import Case
from eplb_triton.kernels.specs import KernelSpec, launch_plan
from eplb_triton.policy import Policy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target; `arguments`: names of those that are passed at a launch."""

    name: str
    arguments: tuple[str, ...]
    target: str
    num_warps: int
    asm: dict[str, Any]

    @property
    def ptx(self) -> str:
        return str(self.asm["ptx"])

    @property
    def amdgcn(self) -> str:
        return str(self.asm["amdgcn"])

    def sass(self) -> str:
        """Disassembly with encodings and, above each instruction, its source line and what that is inlined at."""
        return self._tool("nvdisasm", "-c", "-hex", "-gi")

    def resources(self) -> dict[str, int]:
        """Registers a thread (REG), bytes of STACK, LOCAL and SHARED memory."""
        usage = self._tool("cuobjdump", "-res-usage")
        line = next(line for line in usage.splitlines() if "REG:" in line)
        return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}

    def _tool(self, tool: str, *options: str) -> str:
        descriptor, name = tempfile.mkstemp(suffix=".cubin")
        try:
            with os.fdopen(descriptor, "wb") as cubin:
                cubin.write(self.asm["cubin"])
            done = subprocess.run([_TOOLS / tool, *options, name], capture_output=True, text=True, check=True)
        finally:
            os.unlink(name)
        return done.stdout


def compile_kernel(spec: KernelSpec, target: str, **options: Any) -> Compiled:
    """Compile as a launch on contiguous loads would: aligned pointers, an expert stride of 1, the launcher's options.

    Args:
        spec: a kernel of a `LaunchPlan` made with `lanes` of the target.
        target: a name of `TARGETS`.
        options: instead of the launcher's own.
    """
    names = spec.function.arg_names
    signature = {name: spec.signature[name] for name in names}
    constants = dict(spec.constexprs)
    if "expert_stride" in signature:  # the launch folds an integer argument of 1 into the kernel
        signature["expert_stride"], constants["expert_stride"] = "constexpr", 1
    pointer = [["tt.divisibility", 16]]
    if TARGETS[target].backend == "hip":  # tensors below 2 GiB: buffer instructions
        pointer.append(["tt.pointer_range", 32])
    source = ASTSource(
        spec.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): pointer for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    with triton.knobs.cache.scope():
        # Triton's own cache knows a kernel by its text alone: what it returns may name source files of another
        # checkout, or of a copy that is gone.
        triton.knobs.cache.dir = str(Path(spec.function.fn.__code__.co_filename).parent / "__pycache__" / "triton")
        built = triton.compile(source, target=TARGETS[target], options={**spec.options, **options})
    passed = tuple(name for name in names if signature[name] != "constexpr")
    return Compiled(built.metadata.name, passed, target, built.metadata.num_warps, built.asm)


def compile_plan(
    case: Case, policy: Policy, target: str, *, want_log2phy: bool = True, **options: Any
) -> Iterator[Compiled]:
    """The kernels of a plan, in the order of their launches."""
    lanes = TARGETS[target].warp_size
    launch = launch_plan(case.topology, case.experts, policy, want_log2phy=want_log2phy, lanes=lanes)
    return (compile_kernel(spec, target, **options) for spec in launch.kernels)
