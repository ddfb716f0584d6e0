"""Which backend makes a plan, bound to one shape: the only place that branches on it.

A bound backend is called with loads and the placement to fill. `triton` neither waits nor allocates nor compiles then;
`cpu` and `reference` refuse bad loads before they write anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from eplb_triton.loads import as_loads
from eplb_triton.placement import Placement
from eplb_triton.policy import Policy
from eplb_triton.status import GOOD
from eplb_triton.topology import Topology

BACKENDS = ("auto", "triton", "cpu", "reference")

Bound = Callable[[Tensor, Placement], None]


class Job(NamedTuple):
    """All that a backend must know before loads come."""

    topology: Topology
    num_layers: int
    num_experts: int
    policy: Policy
    device: torch.device
    loads_dtype: torch.dtype
    dtype: torch.dtype  # of the maps
    log2phy: bool | int


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


def bind(backend: str, job: Job) -> Bound:
    """What fills placements of `job`: checked, compiled and allocated here.

    Raises:
        ValueError: the backend cannot take the shape, the type or the device.
        ImportError: it needs a package that cannot be imported.
    """
    if backend == "triton":
        return _on_gpu(job)
    return _on_host(job, _compiled(job) if backend == "cpu" else _in_pytorch(job))


def _on_gpu(job: Job) -> Bound:
    from eplb_triton.kernels.launcher import Launch  # noqa: PLC0415 - Triton is not everywhere

    width = job.topology.num_replicas - job.num_experts + 1 if job.log2phy is True else job.log2phy
    return Launch(
        job.topology,
        job.num_layers,
        job.num_experts,
        job.policy,
        loads_dtype=job.loads_dtype,
        dtype=job.dtype,
        log2phy_width=None if width is False else width,
        device=job.device,
    )


def _on_host(job: Job, fill: Bound) -> Bound:
    """`fill` for placements on any device: what is not on the CPU is planned there and copied."""

    def fill_checked(loads: Tensor, out: Placement) -> None:
        usable = as_loads(loads, name="loads")
        if out.phy2log.device.type == "cpu":
            fill(usable, out)
            return
        width = False if out.log2phy is None else out.log2phy.shape[2]
        made = Placement.empty(job.topology, job.num_layers, job.num_experts, dtype=job.dtype, log2phy=width)
        fill(usable, made)
        out.copy_(made)

    return fill_checked


def _compiled(job: Job) -> Bound:
    from eplb_triton.cpu.launcher import CpuPlan  # noqa: PLC0415 - Numba is not everywhere

    log2phy_type = None if job.log2phy is False else job.dtype
    return CpuPlan(job.topology, job.num_layers, job.num_experts, job.policy, log2phy_type=log2phy_type)


def _in_pytorch(job: Job) -> Bound:
    from eplb_reference import plan_layers  # noqa: PLC0415 - only who asks for it waits for it

    def fill(loads: Tensor, out: Placement) -> None:
        maps = plan_layers(loads, job.topology, job.policy)
        for mine, made in zip((out.phy2log, out.phyrank, out.logcnt), maps, strict=True):
            mine.copy_(made)
        if out.bad is not None:
            out.bad.fill_(GOOD)
        out.refresh_log2phy()

    return fill


@cache
def _imports(package: str) -> bool:
    """Whether `package` can be imported: one that is there may still refuse its NumPy, say."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True
