"""From tensors to the compiled entry points: whole layers, spread over threads."""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from eplb_triton.cpu.arith import Ints
from eplb_triton.cpu.fields import GROUP_PARTITION, MEAN_TAILS, REFINE_EXCHANGE, fields_of
from eplb_triton.cpu.pipeline import compiled_rows, compiled_tail
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import DEFAULT_POLICY, Policy, resolve_policy
from eplb_triton.topology import Topology

SPANS_PER_THREAD = 2  # a thread that starts late takes fewer; after each span it must get the GIL again
SLOTS_PER_THREAD = 16384  # about 0.5 ms of work; a thread costs 0.05 to 0.2 ms, most where other work ran before
EXCHANGE_WORK = 8  # times the work of packing alone


def plan_layers(
    weight: torch.Tensor, topology: Topology, policy: Policy, *, num_threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan every layer with compiled code; the bits do not depend on the number of threads.

    Several threads may call at once: calls share nothing but the compiled code and never wait for each other.
    The first call for a policy compiles it or loads it from Numba's cache: see `warm_up`.

    Args:
        weight: [L, E] float32 on the CPU, tokens per expert; checked: no NaN, no -0, none below 0 or above 2^100.
        topology: checked against E.
        policy: what each stage does.
        num_threads: threads to use at most, the caller's among them; None is torch.get_num_threads().

    Returns:
        phy2log [L, P], the expert in each physical slot; phyrank [L, P], the rank of that replica among the
        expert's; logcnt [L, E], the replicas of each expert. int64.

    Raises:
        TypeError: `weight` is no [L, E] float32 tensor on the CPU.
        ValueError: `num_threads` is below 1.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.dim() != 2:
        came = f"{list(weight.shape)} {weight.dtype} on {weight.device}"
        raise TypeError(f"weight={came} must be [L, E] torch.float32 on cpu; planner.plan converts")
    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1; None is torch.get_num_threads()")

    loads = weight.detach().contiguous().numpy()
    num_layers, num_experts = loads.shape
    num_groups, num_nodes = topology.planned_groups, topology.planned_nodes
    num_replicas, num_gpus = topology.num_replicas, topology.num_gpus
    fields = fields_of(policy)
    plan_rows = compiled_rows(fields)

    has_mean = fields.counts in MEAN_TAILS and num_replicas > num_experts and num_layers > 0
    experts = np.empty((num_layers if has_mean else 0, num_experts), np.int64)
    phy2log = np.empty((num_layers, num_replicas), np.int64)
    phyrank = np.empty_like(phy2log)
    logcnt = np.empty((num_layers, num_experts), np.int64)
    tail_length = 0
    table = _partition_table(fields.group_pack, num_groups, num_nodes)
    sizes = num_replicas, num_groups, num_nodes, num_gpus, table

    def place(first: int, last: int) -> None:
        plan_rows(loads, *sizes, True, False, 0, experts, phy2log, phyrank, logcnt, first, last)

    def plan(first: int, last: int) -> None:
        plan_rows(loads, *sizes, False, True, tail_length, experts, phy2log, phyrank, logcnt, first, last)

    def place_and_plan(first: int, last: int) -> None:
        plan_rows(loads, *sizes, True, True, 0, experts, phy2log, phyrank, logcnt, first, last)

    work = num_layers * num_replicas * (EXCHANGE_WORK if fields.gpu_refine == REFINE_EXCHANGE else 1)
    threads = max(1, min(num_threads, num_layers, work // SLOTS_PER_THREAD))
    if has_mean:
        _in_spans(place, num_layers, threads)
        rows = np.take_along_axis(loads, experts, 1).reshape(num_layers * num_nodes, -1)
        tail_length = compiled_tail(fields.counts)(rows, (num_replicas - num_experts) // num_nodes)
        _in_spans(plan, num_layers, threads)
    else:
        _in_spans(place_and_plan, num_layers, threads)
    return torch.from_numpy(phy2log), torch.from_numpy(phyrank), torch.from_numpy(logcnt)


def warm_up(topology: Topology, policy: str | Policy = DEFAULT_POLICY) -> None:
    """Compile what plans of this kind need, or load it from Numba's cache, before the first of them.

    Seconds without a cache, a tenth of a second with one. Loads are always planned as float32, and one code serves all
    topologies, so that today neither their type nor `topology` makes a difference.

    Raises:
        ValueError: no policy has that name.
    """
    fields = fields_of(resolve_policy(policy))
    compiled_rows(fields)
    if fields.counts in MEAN_TAILS:
        compiled_tail(fields.counts)


@cache
def _partition_table(group_pack: int, num_groups: int, num_nodes: int) -> Ints:
    """[partitions, G] for `pack_partition`, empty where it is not used or there are too many."""
    table = partitions_to_try(num_groups, num_nodes) if group_pack == GROUP_PARTITION else ()
    return np.array(table, np.int64).reshape(len(table), num_groups)


def _in_spans(work: Callable[[int, int], None], num_layers: int, threads: int) -> None:
    """work(first, last) over spans of all layers, by the caller and up to threads - 1 helpers.

    Helpers are started anew each time: a pool would be shared state, dead in a forked child, and saves 0.02 ms.
    The caller waits for spans that are being worked on, never for a helper: one that comes too late finds nothing
    to do, so that on busy cores (where it comes milliseconds late) the caller is no slower than alone.
    """
    if threads == 1:
        work(0, num_layers)
        return
    spans = _Spans(num_layers, threads)
    try:
        for helping in spans.helping:
            _thread.start_new_thread(spans.help_out, (work, helping))  # threading.Thread waits for it to run, 0.03 ms
    except RuntimeError:  # no thread to be had: those that there are do the work
        pass
    spans.finish(work)


class _Spans:
    """Spans of layers that threads take from until none is left. A deque is popped, and a lock released, by any thread
    at any time; a Condition around both would cost a tenth of a millisecond."""

    def __init__(self, num_layers: int, threads: int) -> None:
        most = min(num_layers, threads * SPANS_PER_THREAD)
        self._left = deque(pairwise(np.linspace(0, num_layers, most + 1).astype(int).tolist()))
        self._error: BaseException | None = None
        self.helping = [_thread.allocate_lock() for _ in range(threads - 1)]  # held by a helper at work, or in the end

    def help_out(self, work: Callable[[int, int], None], helping: _thread.LockType) -> None:
        """Work until no span is left; nothing, if the caller is done already."""
        if helping.acquire(blocking=False):
            try:
                self._work_off(work)
            finally:
                helping.release()

    def finish(self, work: Callable[[int, int], None]) -> None:
        """Work until no span is left, and wait for the helpers that are at work."""
        self._work_off(work)
        for helping in self.helping:
            helping.acquire()
        if self._error:
            raise self._error

    def _work_off(self, work: Callable[[int, int], None]) -> None:
        """Work until no span is left; an error stops all threads and is raised in `finish`."""
        try:
            for span in iter(self._take, None):
                work(*span)
        except BaseException as error:
            self._error = error
            self._left.clear()

    def _take(self) -> tuple[int, int] | None:
        try:
            return self._left.popleft()
        except IndexError:
            return None
