"""Moving weights to where a new placement has them: exchanged in batches, staged, written only when every rank has all.

Each rank holds its GPU's slots of every layer. Until the commit nothing of them is touched: a rank that dies, hangs or
has another map leaves the others with the weights and the map they had, and with an error that names it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from eplb_triton.serving.roll import call_roll, in_time
from eplb_triton.serving.transfers import Transfers

_READY, _FAILED = 1, 2  # first word of a report
_NOBODY = -1


class MoveError(RuntimeError):
    """Weights were not moved; on this rank none was written. `ranks`: those at fault, as far as this rank knows."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class WeightsMoved(NamedTuple):
    """What one rank did."""

    slots_fetched: int  # from other ranks
    slots_sent: int
    slots_copied: int  # within this rank
    bytes_received: int
    bytes_sent: int
    batches: int  # of all layers, one after the other
    seconds: float


class _Job(NamedTuple):
    """One transfer that this rank takes part in."""

    peer: int
    send: bool
    parts: list[Tensor]  # bytes to send, or of the staging to receive into; one for each tensor of the layer


@dataclass
class _Work:
    """What this rank has to do, and what became of it."""

    jobs: list[_Job] = field(default_factory=list)
    staged: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a slot, and what it shall hold
    digest: tuple[int, int] = (0, 0)
    copied: int = 0
    batches: int = 0
    waits_for: int = _NOBODY
    lost: dict[int, str] = field(default_factory=dict)  # what was said of a peer that failed
    stream: torch.cuda.Stream | None = None  # of the tensors; None on the CPU


def move_weights(
    tensors: Sequence[Sequence[Tensor]],
    transfers: Transfers,
    group: distributed.ProcessGroup | None = None,
    *,
    control: distributed.ProcessGroup | None = None,
    timeout: float = 60.0,
) -> WeightsMoved:
    """Bring the weights of every slot to where `transfers` says, on all ranks of a group or on none.

    Every rank of the group must call it, rank r being GPU r. The ranks compare what they are about to do; exchange
    slots batch by batch, layer after layer, into new memory; tell one another that all has arrived; then write.

    Args:
        tensors: by layer, the tensors [S, ...] of this rank's slots: any number, shape and dtype, each slot contiguous.
            They are written in place.
        transfers: of the layers of `tensors`, the same on every rank; `Transfers.of` takes one layer.
        group: gloo for tensors on the CPU, NCCL on a GPU; None: all ranks, or this process alone where there are none.
        control: a gloo group of the same ranks in which they talk, such as `agreement.own_group()`; None: `group`, if
            it has a backend for the CPU.
        timeout: seconds for all to come, and again for the exchange. As long again may pass until the last rank knows
            of one that hangs; one that dies is known at once.

    Returns:
        What this rank moved.

    Raises:
        ValueError: a tensor does not fit, or a slot's expert is held nowhere; the other ranks raise MoveError.
        MoveError: ranks have gone, hang, or have other transfers or tensors, and which. No weight was written on this
            rank. The groups are spent then: make new ones of the ranks that are left.

    A rank that dies while the last ones are being told to write may leave some with the new weights and one, which
    raises, with the old: as in any commit, only who is told knows.

    Staging holds what the call writes: the slots written a GPU times their size. Moving layer by layer, each followed
    by its part of the map, holds one layer's.
    """
    began = time.perf_counter()
    talk = group if control is None else control
    alone = group is None and not (distributed.is_available() and distributed.is_initialized())
    rank, ranks = (0, 1) if alone else (distributed.get_rank(group), distributed.get_world_size(group))
    if ranks > 1:
        _check_talk(talk)
    refused: Exception | None = None
    try:
        work = _prepare(tensors, transfers, rank, ranks)
    except Exception as error:  # the others wait for this rank's word
        refused, work = error, _Work()
    reports = call_roll((_FAILED if refused else _READY, *work.digest), talk, timeout) if ranks > 1 else []
    if refused:
        raise refused
    if ranks > 1:
        _refuse_other_plans(reports)
        _exchange(work, group, talk, timeout)
    with torch.no_grad():
        for slot, staged in work.staged:
            slot.copy_(staged)
    received = [job for job in work.jobs if not job.send]
    sent = [job for job in work.jobs if job.send]
    sizes = _bytes_of(received), _bytes_of(sent)
    return WeightsMoved(len(received), len(sent), work.copied, *sizes, work.batches, time.perf_counter() - began)


def _prepare(tensors: Sequence[Sequence[Tensor]], transfers: Transfers, rank: int, ranks: int) -> _Work:
    """Jobs of this rank in order, and staging for all that it writes."""
    source, batch = transfers.source.cpu(), transfers.batch.cpu()
    layers, replicas = source.shape
    if len(tensors) != layers:
        raise ValueError(f"tensors has {len(tensors)} layers, must have {layers} like transfers; see Transfers.of")
    if replicas % ranks:
        raise ValueError(f"transfers are of {replicas} slots, must be of a multiple of the {ranks} ranks of the group")
    Transfers(source, batch, transfers.counts).raise_if_missing()
    size = replicas // ranks
    for layer, parts in enumerate(tensors):
        _check_parts(layer, parts, size)
    digest = hashlib.sha256(source.numpy().tobytes() + batch.numpy().tobytes())
    digest.update(repr([[(part.dtype, part.shape) for part in parts] for parts in tensors]).encode())
    words = digest.digest()
    work = _Work(digest=(int.from_bytes(words[:7], "big"), int.from_bytes(words[7:14], "big")))
    work.batches = int(transfers.counts[:, -1].sum())
    device = next((part.device for parts in tensors for part in parts), source.device)
    work.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    for layer, parts in enumerate(tensors):
        for slot, place, number in _own_transfers(source[layer], batch[layer], rank, size):
            taker, giver = slot // size, place // size
            if taker == rank:
                staged = [part.detach()[place % size].clone() if giver == rank else _like(part) for part in parts]
                targets = [part.detach()[slot % size] for part in parts]
                work.staged += zip(targets, staged, strict=True)
            if number < 0:
                work.copied += 1
            elif taker == rank:
                work.jobs.append(_Job(giver, False, [_as_bytes(part) for part in staged]))
            else:
                work.jobs.append(_Job(taker, True, [_as_bytes(part.detach()[place % size]) for part in parts]))
    return work


def _own_transfers(source: Tensor, batch: Tensor, rank: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(slot, source, batch) of the transfers of a layer in which a rank takes part, copies first, then by batch."""
    slot = torch.arange(len(source), dtype=source.dtype, device="cpu")
    mine = (source != slot) & ((slot // size == rank) | ((source // size == rank) & (batch >= 0)))
    order = batch[mine].argsort(stable=True)
    for column in torch.stack((slot, source, batch), 1)[mine][order].tolist():
        yield column[0], column[1], column[2]


def _exchange(
    work: _Work, group: distributed.ProcessGroup | None, talk: distributed.ProcessGroup | None, timeout: float
) -> None:
    """Do the jobs; return only if every rank has done all of its own.

    Raises:
        MoveError: names those that have not.
    """
    until = time.monotonic() + timeout
    done = in_time(lambda: _do_jobs(work, group), timeout)
    lost = dict(work.lost)  # the thread may still go on
    if not done and work.waits_for != _NOBODY:
        lost.setdefault(work.waits_for, f"did not take part in {timeout:g} s")
    grace = 5.0 + timeout / 10  # for others whose time began later
    state = _READY if done and not lost else _FAILED
    reports = call_roll((state, min(lost, default=_NOBODY)), talk, until - time.monotonic() + grace)
    _refuse_lost_ranks(reports, lost)


def _do_jobs(work: _Work, group: distributed.ProcessGroup | None) -> None:
    """Every transfer of this rank, in order. One with a peer that failed is passed over: the other peers need not wait
    for this rank because of it."""
    stream = work.stream
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        if stream is not None:  # NCCL wants all ranks in the first exchange of a group
            distributed.all_reduce(torch.zeros(1, device=stream.device), group=group)
        for job in work.jobs:
            if job.peer in work.lost:
                continue
            work.waits_for = job.peer
            function = distributed.isend if job.send else distributed.irecv
            try:
                parts = [part for part in job.parts if part.numel()]
                ops = [distributed.P2POp(function, part, group=group, group_peer=job.peer) for part in parts]
                for message in distributed.batch_isend_irecv(ops) if ops else ():
                    message.wait()
                if stream is not None:
                    stream.synchronize()
            except Exception as error:  # the reports name the peer
                work.lost[job.peer] = str(error).strip().partition("\n")[0].partition(". This is")[0]
        work.waits_for = _NOBODY


def _refuse_other_plans(reports: Sequence[tuple[int, ...] | None]) -> None:
    _refuse_absent(reports, {})
    failed = [rank for rank, report in enumerate(reports) if report is not None and report[0] == _FAILED]
    if failed:
        raise MoveError(f"{_named(failed)} cannot move weights and says why itself; nothing was written", failed)
    other = [rank for rank, report in enumerate(reports) if report != reports[0]]
    if other:
        raise MoveError(
            f"{_named(other)} has other transfers or tensors than rank 0; nothing was written; let ranks agree on "
            "a plan before they move weights: eplb_triton.serving.agreement",
            other,
        )


def _refuse_lost_ranks(reports: Sequence[tuple[int, ...] | None], lost: dict[int, str]) -> None:
    _refuse_absent(reports, lost)
    failed = {rank: report[1] for rank, report in enumerate(reports) if report is not None and report[0] == _FAILED}
    if failed:
        late = [rank for rank, peer in failed.items() if peer == _NOBODY]  # others may wait for one that waits for it
        waits = [f"rank {rank} waits for rank {peer}" for rank, peer in failed.items() if peer != _NOBODY]
        words = "; ".join([f"{_named(late)} did not finish"] * bool(late) + waits)
        raise MoveError(f"{words}; nothing was written on any rank{_said(lost)}", late or sorted({*failed.values()}))


def _refuse_absent(reports: Sequence[tuple[int, ...] | None], lost: dict[int, str]) -> None:
    if reports[0] is None:
        raise MoveError(f"rank 0 did not answer; nothing was written on this rank{_said(lost)}", [0])
    absent = [rank for rank, report in enumerate(reports) if report is None]
    if absent:
        raise MoveError(f"{_named(absent)} did not answer; nothing was written on any rank{_said(lost)}", absent)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _said(lost: dict[int, str]) -> str:
    return "".join(f"; of rank {rank} was said: {words}" for rank, words in sorted(lost.items()))


def _check_talk(talk: distributed.ProcessGroup | None) -> None:
    config = str(distributed.get_backend_config(talk))
    if "cpu:" not in config:
        raise ValueError(f"group has backends {config}, none for the CPU; pass control=agreement.own_group()")


def _check_parts(layer: int, parts: Sequence[Tensor], size: int) -> None:
    for number, part in enumerate(parts):
        if part.dim() < 1 or part.shape[0] != size:
            raise ValueError(
                f"tensors[{layer}][{number}] has shape {tuple(part.shape)}, must be [slots of this GPU={size}, ...]"
            )
        if not part[0].is_contiguous():
            raise ValueError(
                f"tensors[{layer}][{number}] has strides {part.stride()}, must have each slot contiguous; what is "
                "stored transposed goes in as the tensor that it is a view of"
            )


def _like(part: Tensor) -> Tensor:
    return torch.empty_like(part[0], memory_format=torch.contiguous_format, requires_grad=False)


def _as_bytes(part: Tensor) -> Tensor:
    """No backend has a name for every dtype; all of them send bytes."""
    return part.reshape(-1).view(torch.uint8)


def _bytes_of(jobs: Sequence[_Job]) -> int:
    return sum(part.numel() for job in jobs for part in job.parts)
