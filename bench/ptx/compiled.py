"""Kernels compiled for machines that are not there, and what the toolchain made of them: PTX, SASS, AMD assembly.

Nothing here needs a GPU: Triton's wheel carries ptxas, nvdisasm and cuobjdump, and compiles for AMD by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.cases import Case
from bench.ptx.listing import Listing, parse_sass
from eplb_triton.kernels.replanning_shapes import replan_plan
from eplb_triton.kernels.specs import KernelSpec, launch_plan
from eplb_triton.policy import Policy
from eplb_triton.testing.models import Model

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
STEPS = 32
"""Most steps of the history of a policy that replans."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target; `arguments`: names of those that are passed at a launch."""

    name: str
    arguments: tuple[str, ...]
    target: str
    num_warps: int
    shared: int  # bytes that a launch asks for
    asm: dict[str, Any]

    @property
    def ptx(self) -> str:
        return str(self.asm["ptx"])

    @property
    def amdgcn(self) -> str:
        return str(self.asm["amdgcn"])

    @cached_property
    def sass_listing(self) -> Listing:
        """The SASS, each instruction with its scheduling bits, its source line and what that is inlined at."""
        return parse_sass(self._tool("nvdisasm", "-c", "-hex", "-gi"))

    @cached_property
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


def compile_kernel(
    spec: KernelSpec, target: str, *, inlined: bool = False, cache: Path | None = None, **options: Any
) -> Compiled:
    """Compile as a launch would: aligned pointers but for the loads, the launcher's options.

    Args:
        spec: a kernel of a `LaunchPlan` made with `lanes` of the target.
        target: a name of `TARGETS`.
        inlined: compile in one piece what the launcher compiles as a function a stage: the same operations, in a form
            that `bench.ptx` and `bench.ptx.sass_cycles`, which know no calls, can run.
        cache: folder of compiled kernels, in place of one beside the sources.
        options: instead of the launcher's own.
    """
    pointer = [["tt.divisibility", 16]]
    if TARGETS[target].backend == "hip":  # tensors below 2 GiB: buffer instructions
        pointer.append(["tt.pointer_range", 32])
    types = {place: kind for name, place, kind in _flat(spec) if name != "loads_ptr"}
    source = ASTSource(
        spec.function,
        signature=dict(spec.signature),
        constexprs=dict(spec.constexprs),
        attrs={place: pointer for place, kind in types.items() if kind.startswith("*")},
    )
    with triton.knobs.cache.scope(), _one_piece(spec.function) if inlined else nullcontext():
        # Triton's own cache knows a kernel by its text alone: what it returns may name source files of another
        # checkout, or of a copy that is gone.
        beside = Path(spec.function.fn.__code__.co_filename).parent / "__pycache__" / "triton"
        triton.knobs.cache.dir = str(cache or beside)
        built = triton.compile(source, target=TARGETS[target], options={**spec.options, **options})
    passed = tuple(name for name, _, kind in _flat(spec) if kind != "constexpr")
    metadata = built.metadata
    return Compiled(metadata.name, passed, target, metadata.num_warps, metadata.shared, built.asm)


@contextmanager
def _one_piece(kernel: Any) -> Iterator[None]:
    """While it lasts, no function of the package of `kernel` is compiled apart."""
    package = kernel.fn.__module__.rpartition(".")[0] + "."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(package)]
    functions = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)}
    apart = [function for function in functions.values() if function.noinline]
    try:
        _set_apart(apart, functions.values(), noinline=False)
        yield
    finally:
        _set_apart(apart, functions.values(), noinline=True)


def _set_apart(apart: Iterable[Any], functions: Iterable[Any], *, noinline: bool) -> None:
    for function in apart:
        function.noinline = noinline
    for function in functions:
        function.hash = None  # it is made of those of the functions that it calls, and of their noinline


def _flat(spec: KernelSpec) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, place and type of every argument; those of a tuple go by their own names."""
    for at, (name, kind) in enumerate(spec.signature.items()):
        if isinstance(kind, tuple):
            names = type(kind)._fields  # type: ignore[attr-defined]
            yield from ((names[inside], (at, inside), its_kind) for inside, its_kind in enumerate(kind))
        else:
            yield name, (at,), kind


def compile_plan(
    model: Case | Model, policy: Policy, target: str, *, want_log2phy: bool = True, **options: Any
) -> Iterator[Compiled]:
    """The kernels of a plan, in the order of their launches; of a policy that replans, from a placement in force."""
    lanes = TARGETS[target].warp_size
    width = model.topology.num_replicas - model.experts + 1 if want_log2phy else None
    if policy.replan:
        shape = replan_plan(model.topology, model.experts, policy, steps=STEPS, log2phy_width=width, warp=lanes)
        yield compile_kernel(shape.kernel(previous=True), target, **options)
        return
    launch = launch_plan(model.topology, model.experts, policy, log2phy_width=width, lanes=lanes)
    yield from (compile_kernel(spec, target, **options) for spec in launch.kernels)
