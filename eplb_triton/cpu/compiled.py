"""How functions of this package are compiled: options that keep every bit, and a cache that is never stale."""

from __future__ import annotations

import gc
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding  # type: ignore[import-untyped]
import numba
from numba.core.caching import FunctionCache

from eplb_triton import constants, replan_status
from eplb_triton.cpu.linking import LeanCompiler, PartCompiler

Function = TypeVar("Function", bound=Callable[..., object])

# No fastmath: nothing is contracted, reordered or approximated. The `numpy` error model divides by zero as
# IEEE does instead of raising, which also leaves no branch in the loops.
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}
PART: dict[str, Any] = {**EXACT, "no_cpython_wrapper": True, "pipeline_class": PartCompiler}

NUMBERS = (constants, replan_status)
"""The modules outside of this package whose numbers compiled code has in it."""


def stage(function: Function) -> Function:
    """Compile `function` when an entry point that calls it is compiled, as a part of that; Python cannot call it.

    A closure is named by what it closes over: code from the cache and code compiled now lie side by side, and of two
    functions of one name LLVM takes the first for both. Numba's own numbers in names start anew in every process.
    """
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = getattr(cell.cell_contents, "py_func", cell.cell_contents)
        function.__qualname__ += f"-{name}-{getattr(value, '__qualname__', value)}"
    return cast(Function, numba.njit(**PART)(function))


def inlined(function: Function) -> Function:
    """A stage that LLVM has to inline, in loops where it finds it too long: else `deepseek` takes 5 % longer."""
    return cast(Function, numba.njit(forceinline=True, **PART)(function))


@cache
def runnable(function: Function) -> Function:
    """A stage that Python can call, compiled at its first call."""
    return cast(Function, numba.njit(**EXACT)(cast(Any, function).py_func))


def entry_point(function: Function, signature: str, specialised_for: str, about: str | None = None) -> Function:
    """Compile `function` now, for `signature` only, or load it from Numba's cache on disk.

    Numba keys a cached function on the source of its own file alone and would go on using it after a change in
    a file that it calls into. It also lets two processes that store two variants of one function at a time
    overwrite each other's code. So the name of the cache file says everything that the code depends on: the
    variant, and a digest of all sources of this package and of the processor.

    Where nothing can be cached (a read-only install and no writable home, a full disk, a damaged file), the
    function is compiled for this process alone. A true compile error shows in the second attempt.

    `about`, "policy balanced, about 8 s", is said when it is really compiled: on stderr at a terminal, else in the log.

    Python collects no garbage meanwhile: a compilation makes millions of objects and drops few, and looking through
    all that a process with PyTorch holds was a tenth of its time.
    """
    function.__qualname__ = f"{function.__name__}-{specialised_for}-{source_digest()}"
    options = {**EXACT, "pipeline_class": _compiler_that_says(about) if about else LeanCompiler}
    with _no_garbage_collection():
        try:
            dispatcher = numba.njit(**options)(function)
            dispatcher._cache = cast(Any, _CacheByName)(function)
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return cast(Function, dispatcher)
        except Exception:
            return cast(Function, numba.njit(signature, **options)(function))


class _CacheByName(FunctionCache):
    """Numba's cache on disk without a look at what the function has closed over: its name says all of that, and stages
    among it have another digest in each process."""

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple()


def _compiler_that_says(about: str) -> type[LeanCompiler]:
    left = [f"eplb_triton: compiling {about} of CPU, once for this machine; `eplb-triton warm` does it ahead"]

    class Telling(LeanCompiler):
        def define_pipelines(self) -> Any:
            if left:  # the second attempt says nothing
                _say(left.pop())
            return super().define_pipelines()

    return Telling


def _say(line: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
    else:
        logging.getLogger("eplb_triton").info(line)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def source_digest() -> str:
    """16 hex digits over the sources of this package and what they read of others, Numba's version, the processor."""
    digest = hashlib.sha256()
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *(Path(str(module.__file__)) for module in NUMBERS)):
        digest.update(source.name.encode() + source.read_bytes())
    processor: Any = (llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten())
    digest.update(repr((numba.__version__, processor)).encode())
    return digest.hexdigest()[:16]
