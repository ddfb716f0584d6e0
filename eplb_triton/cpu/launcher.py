"""From tensors to the compiled entry points: whole layers, spread over threads."""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_triton.cpu.arith import Ints
from eplb_triton.cpu.fields import GROUP_PARTITION, MEAN_COUNTS, REFINE_EXCHANGE, fields_of
from eplb_triton.cpu.pipeline import compiled_log2phy, compiled_mean_length, compiled_rows
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import DEFAULT_POLICY, Policy, resolve_policy
from eplb_triton.topology import Topology

SPANS_PER_THREAD = 2  # a thread that starts late takes fewer; after each span it must get the GIL again
SLOTS_PER_THREAD = 16384  # about 0.5 ms of work; a thread costs 0.05 to 0.2 ms, most where other work ran before
EXCHANGE_WORK = 8  # times the work of packing alone

FINE = -1  # in Maps.bad


class Maps(Protocol):
    """What a plan fills, NumPy arrays or tensors on the CPU, each with strides of its own."""

    @property
    def phy2log(self) -> Any:
        """[L, P] int64 or int32, the expert in each physical slot."""

    @property
    def phyrank(self) -> Any:
        """[L, P] int64 or int32, the rank of that replica among the expert's."""

    @property
    def logcnt(self) -> Any:
        """[L, E] int64 or int32, the replicas of each expert."""

    @property
    def log2phy(self) -> Any:
        """[L, E, width] int64 or int32, the slots of each expert by rank, padded with -1; None: not wanted."""

    @property
    def bad(self) -> Any:
        """[L, N] int32: FINE, or TOO_MANY where an expert has more replicas than log2phy is wide."""


class CpuPlan:
    """Plans of one shape by one policy: what does not depend on the loads is compiled and laid out here, once.

    Any number of threads may call one object at once: calls share nothing that changes.

    Args:
        topology: checked against E.
        num_layers: L.
        num_experts: E.
        policy: what each stage does.
        log2phy_type: torch.int64 or torch.int32 compiles what fills a log2phy of that type here, too; None leaves it
            to the first call with one.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        policy: Policy,
        *,
        log2phy_type: torch.dtype | None = None,
    ) -> None:
        fields = fields_of(policy)
        num_groups, num_nodes = topology.planned_groups, topology.planned_nodes
        num_replicas, num_gpus = topology.num_replicas, topology.num_gpus
        table = _partition_table(fields.group_pack, num_groups, num_nodes)
        self._sizes = num_replicas, num_groups, num_nodes, num_gpus, table
        self._num_layers, self._num_experts = num_layers, num_experts
        self._plan_rows = compiled_rows(fields)
        has_mean = fields.counts in MEAN_COUNTS and num_replicas > num_experts and num_layers > 0
        self._mean_length = compiled_mean_length(fields.counts) if has_mean else None
        work = num_layers * num_replicas * (EXCHANGE_WORK if fields.gpu_refine == REFINE_EXCHANGE else 1)
        self._most_threads = max(1, min(num_layers, work // SLOTS_PER_THREAD))
        if log2phy_type is not None:
            compiled_log2phy(str(log2phy_type).removeprefix("torch."))

    def __call__(self, loads: Any, maps: Maps, *, num_threads: int | None = None) -> None:
        """Fill `maps`; the bits do not depend on the number of threads.

        Args:
            loads: [L, E] float32, NumPy or on the CPU, contiguous, tokens per expert; checked: no NaN, no -0, none
                below 0 or above 2^100.
            maps: filled in place. Of an expert with more replicas than log2phy is wide the first are listed.
            num_threads: threads to use at most, the caller's among them; None is torch.get_num_threads().
        """
        given = _array(loads)
        phy2log, phyrank, logcnt = map(_array, (maps.phy2log, maps.phyrank, maps.logcnt))
        bad, log2phy = _array(maps.bad), None if maps.log2phy is None else _array(maps.log2phy)
        bad[...] = FINE
        plan_rows, sizes, num_layers = self._plan_rows, self._sizes, self._num_layers
        filled = _as_compiled(phy2log), _as_compiled(phyrank), _as_compiled(logcnt)
        experts = np.empty((num_layers if self._mean_length else 0, self._num_experts), np.int64)
        threads = min(torch.get_num_threads() if num_threads is None else num_threads, self._most_threads)
        place, mean_length = self._mean_length is None, 0
        if self._mean_length:

            def place_groups(first: int, last: int) -> None:
                plan_rows(given, *sizes, True, False, 0, experts, *filled, first, last)

            num_replicas, _, num_nodes, *_ = sizes
            _in_spans(place_groups, num_layers, threads)
            rows = np.take_along_axis(given, experts, 1).reshape(num_layers * num_nodes, -1)
            mean_length = self._mean_length(rows, (num_replicas - self._num_experts) // num_nodes)

        def plan(first: int, last: int) -> None:
            plan_rows(given, *sizes, place, True, mean_length, experts, *filled, first, last)
            for wanted, made in zip((phy2log, phyrank, logcnt), filled, strict=True):
                if wanted is not made:
                    wanted[first:last] = made[first:last]
            if log2phy is not None:
                compiled_log2phy(log2phy.dtype.name)(filled[0], filled[1], log2phy, bad, first, last)

        _in_spans(plan, num_layers, threads)


class _NewMaps(NamedTuple):
    phy2log: Ints
    phyrank: Ints
    logcnt: Ints
    log2phy: None
    bad: NDArray[np.int32]


def plan_layers(
    loads: torch.Tensor, topology: Topology, policy: Policy, *, num_threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan every layer with compiled code, once; see `CpuPlan`.

    Args:
        loads: [L, E] float32 on the CPU, tokens per expert; checked: no NaN, no -0, none below 0 or above 2^100.
        topology: checked against E.
        policy: what each stage does.
        num_threads: threads to use at most, the caller's among them; None is torch.get_num_threads().

    Returns:
        phy2log [L, P], the expert in each physical slot; phyrank [L, P], the rank of that replica among the
        expert's; logcnt [L, E], the replicas of each expert. int64.

    Raises:
        TypeError: `loads` is no [L, E] float32 tensor on the CPU.
        ValueError: `num_threads` is below 1.
    """
    if loads.device.type != "cpu" or loads.dtype != torch.float32 or loads.dim() != 2:
        came = f"{list(loads.shape)} {loads.dtype} on {loads.device}"
        raise TypeError(f"loads={came} must be [L, E] torch.float32 on cpu; planner.plan converts")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1; None is torch.get_num_threads()")
    num_layers, num_experts = loads.shape
    slots, experts = (num_layers, topology.num_replicas), (num_layers, num_experts)
    maps = _NewMaps(
        np.empty(slots, np.int64),
        np.empty(slots, np.int64),
        np.empty(experts, np.int64),
        None,
        np.empty((num_layers, topology.planned_nodes), np.int32),
    )
    CpuPlan(topology, num_layers, num_experts, policy)(loads.detach().contiguous(), maps, num_threads=num_threads)
    return torch.from_numpy(maps.phy2log), torch.from_numpy(maps.phyrank), torch.from_numpy(maps.logcnt)


def warm_up(topology: Topology, policy: str | Policy = DEFAULT_POLICY) -> None:
    """Compile what plans of this kind need, or load it from Numba's cache, before the first of them.

    Seconds without a cache, a tenth of a second with one. Loads are always planned as float32, and one code serves all
    topologies, so that today neither their type nor `topology` makes a difference.

    Raises:
        ValueError: no policy has that name.
    """
    compile_for(resolve_policy(policy))


def compile_for(policy: Policy) -> str | None:
    """Compile all that plans by `policy` can need; the folder of Numba's cache, None if nothing could be cached."""
    fields = fields_of(policy)
    entry: Any = compiled_rows(fields)
    if fields.counts in MEAN_COUNTS:
        compiled_mean_length(fields.counts)
    for log2phy_type in ("int64", "int32"):
        compiled_log2phy(log2phy_type)
    if policy.replan:
        from eplb_triton.cpu.relabelling import compiled_relabel  # noqa: PLC0415 - which import this module
        from eplb_triton.cpu.replanning import compiled_replan  # noqa: PLC0415

        compiled_replan()
        compiled_relabel()
    folder: str | None = entry.stats.cache_path
    return folder


def _array(given: Any) -> NDArray[Any]:
    """The memory of an array or tensor as an array."""
    return given if isinstance(given, np.ndarray) else cast(NDArray[Any], given.numpy())


def _as_compiled(wanted: NDArray[Any]) -> NDArray[Any]:
    """`wanted` if compiled code can fill it, else an array that it can."""
    return wanted if wanted.dtype == np.int64 and wanted.flags.c_contiguous else np.empty(wanted.shape, np.int64)


@cache
def _partition_table(group_pack: int, num_groups: int, num_nodes: int) -> Ints:
    """[partitions, G] for `pack_partition`, empty where it is not used or there are too many."""
    table = partitions_to_try(num_groups, num_nodes) if group_pack == GROUP_PARTITION else ()
    return np.array(table, np.int64).reshape(len(table), num_groups)


def _in_spans(
    work: Callable[[int, int], None], num_layers: int, threads: int, spans_per_thread: int = SPANS_PER_THREAD
) -> None:
    """work(first, last) over spans of all layers, by the caller and up to threads - 1 helpers.

    Helpers are started anew each time: a pool would be shared state, dead in a forked child, and saves 0.02 ms.
    The caller waits for spans that are being worked on, never for a helper: one that comes too late finds nothing
    to do, so that on busy cores (where it comes milliseconds late) the caller is no slower than alone.
    """
    if threads == 1:
        work(0, num_layers)
        return
    spans = _Spans(num_layers, threads * spans_per_thread, threads - 1)
    try:
        for helping in spans.helping:
            _thread.start_new_thread(spans.help_out, (work, helping))  # threading.Thread waits for it to run, 0.03 ms
    except RuntimeError:  # no thread to be had: those that there are do the work
        pass
    spans.finish(work)


class _Spans:
    """Spans of layers that threads take from until none is left. A deque is popped, and a lock released, by any thread
    at any time; a Condition around both would cost a tenth of a millisecond."""

    def __init__(self, num_layers: int, num_spans: int, num_helpers: int) -> None:
        most = min(num_layers, num_spans)
        self._left = deque(pairwise(np.linspace(0, num_layers, most + 1).astype(int).tolist()))
        self._error: BaseException | None = None
        self.helping = [_thread.allocate_lock() for _ in range(num_helpers)]  # held by a helper at work, or in the end

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
