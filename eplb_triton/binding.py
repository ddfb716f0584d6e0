"""Which backend makes a plan, bound to one shape: the only place that branches on it.

A bound backend is called with loads and the placement to fill. `triton` neither waits nor allocates nor compiles then;
`cpu` and `reference` refuse bad loads before they write anything.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from eplb_triton import slot_maps
from eplb_triton.loads import as_loads
from eplb_triton.placement import Placement
from eplb_triton.placement_rules import refuse_previous
from eplb_triton.policy import Policy
from eplb_triton.replans import Replanned
from eplb_triton.serving import dispatch
from eplb_triton.status import GOOD
from eplb_triton.topology import Topology

Fill = Callable[[Tensor, Placement], None]
"""Called with loads [L, E] and the placement to fill."""
Replan = Callable[[Tensor, Placement, Tensor | None, float, int | None], None]
"""Called with a history [n, L, E], the placement to fill, the slot map [L, P] in force or None, a price and a limit."""
Relabel = Callable[[Tensor, Placement], None]
"""Called with the slot map [L, P] in force and the placement whose slots it renumbers."""


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
    steps: int  # most of a history


def bind(backend: str, job: Job) -> Fill:
    """What fills placements of `job`: checked, compiled and allocated here.

    Raises:
        ValueError: the backend cannot take the shape, the type or the device.
        ImportError: it needs a package that cannot be imported.
    """
    if backend == "triton":
        return _on_gpu(job)
    return _on_host(job, _compiled(job) if backend == "cpu" else _in_pytorch(job))


def _on_gpu(job: Job) -> Fill:
    from eplb_triton.kernels.launcher import Launch  # noqa: PLC0415 - Triton is not everywhere
    from eplb_triton.kernels.steps import StepsLaunch  # noqa: PLC0415

    has_steps = job.steps > 1
    launch = Launch(
        job.topology,
        job.num_layers,
        job.num_experts,
        job.policy,
        loads_dtype=torch.float32 if has_steps else job.loads_dtype,
        dtype=job.dtype,
        log2phy_width=_log2phy_width(job),
        device=job.device,
    )
    if not has_steps:
        return lambda loads, out: launch(loads[0] if loads.dim() == 3 else loads, out)
    add_steps = StepsLaunch(job.num_layers, job.num_experts, job.loads_dtype, job.device)
    return lambda loads, out: launch(add_steps(loads if loads.dim() == 3 else loads.unsqueeze(0)), out)


def _log2phy_width(job: Job) -> int | None:
    if job.log2phy is False:
        return None
    return job.topology.num_replicas - job.num_experts + 1 if job.log2phy is True else job.log2phy


def _on_host(job: Job, fill: Fill) -> Fill:
    """`fill` for placements on any device: what is not on the CPU is planned there and copied."""

    def fill_checked(loads: Tensor, out: Placement) -> None:
        usable = _summed(as_loads(loads, name="loads", history=loads.dim() == 3))
        if out.phy2log.device.type == "cpu":
            fill(usable, out)
            return
        width = False if out.log2phy is None else out.log2phy.shape[2]
        made = Placement.empty(job.topology, job.num_layers, job.num_experts, dtype=job.dtype, log2phy=width)
        fill(usable, made)
        out.copy_(made)

    return fill_checked


def _summed(loads: Tensor) -> Tensor:
    """[L, E] float32: the steps of a history added in float64, oldest first, and rounded once."""
    if loads.dim() == 2:
        return loads
    total = torch.zeros(loads.shape[1:], dtype=torch.float64, device="cpu")
    for step in loads:
        total += step
    return as_loads(total, name="loads, summed over steps,")


def _replan_on_gpu(job: Job) -> Replan:
    from eplb_triton.kernels.replanning import Outputs  # noqa: PLC0415 - Triton is not everywhere
    from eplb_triton.kernels.replanning_launcher import ReplanLaunch  # noqa: PLC0415

    launch = ReplanLaunch(
        job.topology,
        job.num_layers,
        job.num_experts,
        job.policy,
        steps=job.steps,
        loads_dtype=job.loads_dtype,
        dtype=job.dtype,
        log2phy_width=_log2phy_width(job),
        device=job.device,
    )
    classify = bind_classify("triton", job)

    def replan(history: Tensor, out: Placement, before: Tensor | None, price: float, moves: int | None) -> None:
        assert out.changes is not None
        assert out.bad is not None
        maps = Outputs(out.phy2log, out.phyrank, out.logcnt, out.log2phy, *out.changes, out.bad)
        launch(history, out=maps, previous=before, price=price, moves=moves)
        classify(out)

    return replan


def _relabel_on_gpu(job: Job) -> Relabel:
    from eplb_triton.kernels.relabelling_launcher import RelabelLaunch  # noqa: PLC0415 - Triton is not everywhere

    sizes = job.topology, job.num_layers, job.num_experts
    return RelabelLaunch(*sizes, dtype=job.dtype, log2phy_width=_log2phy_width(job), device=job.device)


def bind_classify(backend: str, job: Job) -> Callable[[Placement], None]:
    """What writes the classes of placements of `job` from their slot maps; see `bind`."""
    if backend == "triton":
        from eplb_triton.kernels.serve_launch import ClassLaunch  # noqa: PLC0415 - Triton is not everywhere

        sizes = job.num_layers, job.num_experts, job.topology.num_replicas, job.topology.num_gpus
        launch = ClassLaunch(*sizes, job.dtype, job.device)

        def on_gpu(out: Placement) -> None:
            assert out.classes is not None
            launch(out.phy2log, out.classes)

        return on_gpu

    def on_host(out: Placement) -> None:
        assert out.classes is not None
        dispatch.classify(out.phy2log, job.num_experts, job.topology, backend=backend, out=out.classes)

    return on_host


def bind_replan(backend: str, job: Job) -> Replan:
    """What replans placements of `job`, whose policy has `replan`; see `bind`."""
    if backend == "triton":
        return _replan_on_gpu(job)
    module = import_module("eplb_triton.cpu.replanning" if backend == "cpu" else "eplb_reference.replanning")
    if backend == "cpu":
        module.compiled_replan()

    def replan(history: Tensor, out: Placement, before: Tensor | None, price: float, moves: int | None) -> None:
        usable = as_loads(history, name="loads", history=True)
        if not job.num_layers:
            return
        held = None if before is None else before.to("cpu", torch.int64)
        made: Replanned = module.replan_layers(usable, job.topology, job.policy, held, price, moves)
        refuse_previous(made.status)
        assert out.changes is not None
        out.phy2log.copy_(made.phy2log)
        for mine, its in zip(out.changes, made[1:], strict=True):
            mine.copy_(its)
        out.refresh()

    return replan


def bind_relabel(backend: str, job: Job) -> Relabel:
    """What renumbers the slots of placements of `job` so that experts stay where they are, but for the classes, which
    follow from the slots; see `bind`."""
    if backend == "triton":
        return _relabel_on_gpu(job)
    module = import_module("eplb_triton.cpu.relabelling" if backend == "cpu" else "eplb_reference.relabelling")

    def relabel(before: Tensor, out: Placement) -> None:
        held, planned = (slots.to("cpu", torch.int64) for slots in (before, out.phy2log))
        out.phy2log.copy_(module.relabel(held, planned, job.topology))
        slot_maps.refresh(out)

    return relabel


def _compiled(job: Job) -> Fill:
    from eplb_triton.cpu.launcher import CpuPlan  # noqa: PLC0415 - Numba is not everywhere

    log2phy_type = None if job.log2phy is False else job.dtype
    return CpuPlan(job.topology, job.num_layers, job.num_experts, job.policy, log2phy_type=log2phy_type)


def _in_pytorch(job: Job) -> Fill:
    from eplb_reference import plan_layers  # noqa: PLC0415 - only who asks for it waits for it

    def fill(loads: Tensor, out: Placement) -> None:
        maps = plan_layers(loads, job.topology, job.policy)
        for mine, made in zip((out.phy2log, out.phyrank, out.logcnt), maps, strict=True):
            mine.copy_(made)
        if out.bad is not None:
            out.bad.fill_(GOOD)
        out.refresh_log2phy()

    return fill
