"""Agreement: ranks that plan on their own say what they planned before any of them moves a weight.

A rank that deploys another map than its peers hangs one framework and serves wrong weights in another, both without a
word. One all-reduce of a few integers turns that into a line in every log.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, cast

import torch
from torch import Tensor, distributed

from eplb_triton import __version__
from eplb_triton.constants import SPEC_VERSION

logger = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds after which a rank that waits for the others says so, and why that may be."""


class Verdict(NamedTuple):
    """What the ranks found; the same on every one of them."""

    agreed: bool  # every rank has the same plan, by the same specification and version
    stopped: bool  # at least one rank asks to stop
    reason: str  # why they do not agree, or ""


def agree(
    fingerprint: str | None,
    group: distributed.ProcessGroup | None,
    *,
    stop: bool = False,
    device: torch.device | str = "cpu",
    spec_version: int = SPEC_VERSION,
    version: str = __version__,
) -> Verdict:
    """Whether every rank of a group has the same plan: one all-reduce, MAX of [h, -h] for each number h compared.

    Every rank of the group must call it, one that failed too. It never raises: where the others cannot be reached, the
    ranks do not agree.

    Args:
        fingerprint: 16 hexadecimal digits, of `Placement.fingerprint`; None: this rank has no plan.
        group: of the ranks that share the experts, of a backend that reduces int64 on `device`; None: this rank alone.
        stop: whether this rank asks all to stop.
        device: where the reduced tensor is: "cpu" for gloo.
        spec_version, version: of the specification and the package, compared too: a rolling upgrade does not mix plans.

    Returns:
        The same on every rank.
    """
    facts = {
        "plan": [int(fingerprint or "0", 16) >> 32, int(fingerprint or "0", 16) & 0xFFFFFFFF],
        "specification": [spec_version],
        "package version": [int(hashlib.sha256(version.encode()).hexdigest()[:12], 16)],
    }
    failed = fingerprint is None
    mine = torch.tensor([number for numbers in facts.values() for number in numbers], dtype=torch.int64, device="cpu")
    flags = torch.tensor([failed, stop], dtype=torch.int64, device="cpu")
    try:
        most, least, (any_failed, any_stop) = _extremes(mine, flags, group, device)
    except Exception as error:  # a peer has gone, or the group has: a serving thread goes on with the map it has
        logger.exception("ranks cannot be compared; the placement in force is kept")
        return Verdict(False, stop, f"other ranks cannot be reached: {type(error).__name__}")
    differing, at = [], 0
    for name, numbers in facts.items():
        if most[at : at + len(numbers)] != least[at : at + len(numbers)]:
            differing.append(name)
        at += len(numbers)
    if any_failed:
        return Verdict(False, bool(any_stop), "a rank could not plan")
    return Verdict(not differing, bool(any_stop), f"ranks differ in {' and '.join(differing)}" if differing else "")


def own_group(timeout: timedelta | None = None) -> distributed.ProcessGroup | None:
    """A gloo group of all ranks that nobody else uses: for a thread beside one that uses the framework's.

    Every rank must call it, in the same order among its collectives.

    Returns:
        None where torch.distributed is not initialised, or this process is alone in it.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return None
    # torch 2.14 says that a process outside of the group gets another thing: none is
    return cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=timeout))


def _extremes(
    mine: Tensor, flags: Tensor, group: distributed.ProcessGroup | None, device: torch.device | str
) -> tuple[list[int], list[int], list[int]]:
    """Largest and smallest of each number over the ranks, and the largest of each flag."""
    reduced = torch.cat((mine, -mine, flags)).to(device)
    if group is not None and distributed.get_world_size(group) > 1:
        with _told_if_late():
            distributed.all_reduce(reduced, distributed.ReduceOp.MAX, group)
    numbers = reduced.tolist()
    n = len(mine)
    return numbers[:n], [-number for number in numbers[n : 2 * n]], numbers[2 * n :]


@contextmanager
def _told_if_late() -> Iterator[None]:
    def tell() -> None:
        logger.warning(
            "waiting for other ranks since %.0f s, to compare plans; is eplb_triton installed and enabled by the same "
            "environment variables on every one of them?",
            PATIENCE,
        )

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
