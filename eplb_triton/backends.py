"""The names of the backends, and which one `auto` is."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

BACKENDS = ("auto", "triton", "cpu", "reference")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that plans loads on `device` when `backend` is asked for: never `auto`.

    Raises:
        ValueError: no backend has that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if device.type == "cuda" and _imports("triton"):  # PyTorch calls AMD's GPUs cuda too
        return "triton"
    return "cpu" if _imports("numba") else "reference"


@cache
def _imports(package: str) -> bool:
    """Whether `package` can be imported: one that is there may still refuse its NumPy, say."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True
