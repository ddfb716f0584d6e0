"""How functions of this package are compiled: options that keep every bit, and a cache that is never stale."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding  # type: ignore[import-untyped]
import numba

Function = TypeVar("Function", bound=Callable[..., object])

# No fastmath: nothing is contracted, reordered or approximated. The `numpy` error model divides by zero as
# IEEE does instead of raising, which also leaves no branch in the loops.
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}


def stage(function: Function) -> Function:
    """Compile `function` when an entry point that calls it is compiled, or at its first call from Python."""
    return cast(Function, numba.njit(**EXACT)(function))


def entry_point(function: Function, signature: str, specialised_for: str) -> Function:
    """Compile `function` now, for `signature` only, or load it from Numba's cache on disk.

    Numba keys a cached function on the source of its own file alone and would go on using it after a change in
    a file that it calls into. It also lets two processes that store two variants of one function at a time
    overwrite each other's code. So the name of the cache file says everything that the code depends on: the
    variant, and a digest of all sources of this package and of the processor.

    Where nothing can be cached (a read-only install and no writable home, a full disk, a damaged file), the
    function is compiled for this process alone. A true compile error shows in the second attempt.
    """
    function.__qualname__ = f"{function.__name__}-{specialised_for}-{source_digest()}"
    try:
        return cast(Function, numba.njit(signature, cache=True, **EXACT)(function))
    except Exception:
        return cast(Function, numba.njit(signature, **EXACT)(function))


@cache
def source_digest() -> str:
    """16 hex digits over this package's sources, Numba's version and the processor that code is made for."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    processor: Any = (llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten())
    digest.update(repr((numba.__version__, processor)).encode())
    return digest.hexdigest()[:16]
