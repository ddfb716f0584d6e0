"""A roll call: what every rank reports, told to every rank, in a time that is limited whoever has died.

A collective that a dead rank takes part in raises on some ranks and hangs on others, and names nobody. Here rank 0 asks
each of the others, waits so long and no longer, and tells all of them what it heard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import distributed

_TAG = 0x0A11  # apart from messages of others on the same group


def in_time(work: Callable[[], None], seconds: float) -> bool:
    """Whether `work` returned in time; it goes on in a thread of its own if not. What it raises is raised here.

    A wait of gloo that is given a time breaks every connection of the process when that has passed, those to ranks that
    are well too; a thread that waits without end breaks none.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if raised:
        raise raised[0]
    return not thread.is_alive()


def call_roll(
    report: Sequence[int], group: distributed.ProcessGroup | None, seconds: float
) -> list[tuple[int, ...] | None]:
    """The report of every rank, by rank; None for one that was not heard. Every rank of the group must call it.

    Args:
        report: integers, as many on every rank, the first of them not 0.
        group: of a backend for tensors on the CPU; None: all ranks.
        seconds: that rank 0 waits for the others. They wait for rank 0 as long again.

    Returns:
        The same on every rank that hears rank 0; on one that does not, its own report alone.
    """
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    table = torch.zeros(ranks, len(report), dtype=torch.int64, device="cpu")
    table[rank] = torch.tensor(report, dtype=torch.int64, device="cpu")
    others = [number for number in range(ranks) if number]
    if rank == 0:
        in_time(lambda: _receive(table, others, group), seconds)
        heard = table.clone()  # later words change nothing
        in_time(lambda: _send(heard, [number for number in others if heard[number, 0]], group), seconds)
    else:
        heard = table.clone()
        told = torch.zeros_like(table)
        in_time(lambda: _report(table[rank].clone(), told, group), 2 * seconds)
        if told[0, 0]:
            heard = told.clone()
    return [tuple(row) if row[0] else None for row in heard.tolist()]


def _receive(table: torch.Tensor, ranks: Sequence[int], group: distributed.ProcessGroup | None) -> None:
    """Fill the rows of ranks in the table as they come."""
    waiting = []
    for number in ranks:
        try:
            waiting.append(distributed.irecv(table[number], group=group, tag=_TAG, group_src=number))
        except RuntimeError:  # it has gone
            continue
    for work in waiting:
        _finish(work)


def _send(heard: torch.Tensor, ranks: Sequence[int], group: distributed.ProcessGroup | None) -> None:
    waiting = []
    for number in ranks:
        try:
            waiting.append(distributed.isend(heard, group=group, tag=_TAG, group_dst=number))
        except RuntimeError:
            continue
    for work in waiting:
        _finish(work)


def _report(mine: torch.Tensor, told: torch.Tensor, group: distributed.ProcessGroup | None) -> None:
    try:
        _finish(distributed.isend(mine, group=group, tag=_TAG, group_dst=0))
        _finish(distributed.irecv(told, group=group, tag=_TAG, group_src=0))
    except RuntimeError:  # rank 0 has gone: `told` stays as it is
        return


def _finish(work: distributed.Work | None) -> None:
    """Wait for one message; a rank that went is no error here: its row stays as it is."""
    try:
        if work is not None:
            work.wait()
    except RuntimeError:
        return
