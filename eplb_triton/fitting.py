"""Whether what a planner is called with fits what it was made for; nothing here reads a value or waits."""

from __future__ import annotations

import math

from torch import Tensor

from eplb_triton.binding import Job
from eplb_triton.buffers import overlap
from eplb_triton.loads import check_shape
from eplb_triton.placement import Placement


def check_loads(job: Job, backend: str, loads: Tensor) -> None:
    """Refuse loads of another shape, and on a GPU of another dtype, device or of too many steps.

    Raises:
        TypeError, ValueError: names what `loads` is and must be.
    """
    check_shape(loads, name="loads", history=isinstance(loads, Tensor) and loads.dim() == 3)
    if tuple(loads.shape[-2:]) != (job.num_layers, job.num_experts):
        raise ValueError(
            f"loads has shape {tuple(loads.shape)}, must be [layers, experts] = {(job.num_layers, job.num_experts)}, "
            "or steps of that"
        )
    if backend != "triton":
        return
    if loads.dim() == 3 and len(loads) > job.steps:
        raise ValueError(f"loads has {len(loads)} steps, must have at most steps={job.steps}, as this planner was made")
    if (loads.dtype, loads.device) != (job.loads_dtype, job.device):
        raise ValueError(
            f"loads is {loads.dtype} on {loads.device}, must be {job.loads_dtype} on {job.device}, as this planner was "
            "made"
        )


def check_out(job: Job, shapes: dict[str, tuple[int, ...]], out: Placement) -> None:
    """Refuse a placement that a planner of `job` cannot fill.

    Raises:
        TypeError, ValueError: names the tensor, what it is and what it must be.
    """
    if not isinstance(out, Placement):
        raise TypeError(f"out is a {type(out).__name__}, must be a Placement of planner.empty() or planner.over()")
    if out.topology != job.topology:
        raise ValueError(f"out is of {out.topology}, must be of {job.topology}")
    for name, shape in shapes.items():
        tensor = getattr(out, name)
        if tensor is None:
            raise ValueError(f"out has no {name}, must have one of shape {shape}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"out.{name} has shape {tuple(tensor.shape)}, must be {shape}")
    if out.log2phy is not None and "log2phy" not in shapes:
        width = out.log2phy.shape[2]
        raise ValueError(
            f"out has a log2phy of width {width}, must have none: this planner was made without; log2phy={width} makes "
            "one that fills it"
        )
    if job.policy.replan and out.changes is None:
        raise ValueError(
            f"out has no changes, must have them for policy={job.policy.name!r}: planner.empty() makes them"
        )
    if (out.phy2log.dtype, out.phy2log.device) != (job.dtype, job.device):
        raise ValueError(f"out is {out.phy2log.dtype} on {out.phy2log.device}, must be {job.dtype} on {job.device}")


def slots_before(job: Job, previous: Placement, out: Placement) -> Tensor:
    """The slot map in force, refused where it cannot belong to a plan into `out`.

    Raises:
        TypeError, ValueError: names what `previous` is and must be; it shares memory with `out`.
    """
    if not isinstance(previous, Placement):
        raise TypeError(f"previous is a {type(previous).__name__}, must be a Placement")
    if (previous.topology, previous.logcnt.shape) != (job.topology, out.logcnt.shape):
        raise ValueError(
            f"previous is of {previous.topology} and [layers, experts] = {list(previous.logcnt.shape)}, must be of "
            f"{job.topology} and {list(out.logcnt.shape)}"
        )
    before = previous.phy2log
    if (before.dtype, before.device) != (job.dtype, job.device):
        raise ValueError(f"previous is {before.dtype} on {before.device}, must be {job.dtype} on {job.device}")
    if any(overlap(before, mine) for mine in (out.phy2log, out.phyrank, out.logcnt, out.log2phy)):
        raise ValueError("previous shares memory with out, must not: it is read while out is written")
    return before


def check_price(price: float) -> float:
    """`price` as a float, refused where no slot can save it."""
    if not 0 <= price < math.inf:
        raise ValueError(f"price={price!r} must be at least 0 and finite")
    return float(price)


def check_moves(moves: int) -> int:
    """`moves`, refused where it is no number of slots."""
    if isinstance(moves, bool) or not isinstance(moves, int) or moves < 0:
        raise ValueError(f"moves={moves!r} must be an integer of at least 0, or None for no limit")
    return moves
