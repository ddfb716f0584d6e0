"""From a framework's question to a map that every rank deploys, or to none: what both adapters share.

Whatever one rank alone may find (a backend that fails, a stop file) is decided together, by `agree`; whatever is
decided before that follows from arguments that all ranks have alike.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from eplb_triton import Placement, Planner, Topology, __version__
from eplb_triton.backends import resolve_backend
from eplb_triton.constants import MAX_LOAD, SPEC_VERSION
from eplb_triton.integrations.in_force import can_be_kept, can_be_replanned, fitted
from eplb_triton.integrations.metrics import prometheus
from eplb_triton.integrations.settings import Settings
from eplb_triton.policy import DEFAULT_POLICY, Policy, resolve_policy
from eplb_triton.serving.agreement import Verdict, agree

logger = logging.getLogger(__name__)

MOST_PLANNERS = 8
"""Kept at a time: two models, a policy and its fallback each."""


class Answer(NamedTuple):
    """What a framework is to deploy."""

    phy2log: Tensor | None  # [L, P] int64 on the device of the loads; None: let the framework plan
    outcome: str  # deployed, kept (the map in force), shadow, stopped or own
    disagreed: bool = False


class Made(NamedTuple):
    """A plan of this rank."""

    placement: Placement
    loads: Tensor  # [L, E] float64, mean of the history
    backend: str
    policy: str


class Replanner:
    """Answers for one framework, by one Settings. `answer` never raises, and any thread may call it."""

    def __init__(self, framework: str, settings: Settings) -> None:
        self.framework, self.settings = framework, settings
        self._planners: OrderedDict[tuple[object, ...], Planner] = OrderedDict()
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def topology(self, experts: int, replicas: int, groups: int, nodes: int, ranks: int) -> Topology:
        """What is planned for: globally where groups and nodes do not fit, or where the settings say so.

        Raises:
            TypeError, ValueError: no plan of these counts can be made.
        """
        fits = groups >= 1 and nodes >= 1 and groups % nodes == 0 and ranks % nodes == 0 and experts % groups == 0
        if self.settings.strategy == "global" or not fits:
            if self.settings.strategy == "hierarchical":
                self.tell_once(f"{experts} experts in {groups} groups do not fit {ranks} GPUs on {nodes} nodes; global")
            groups = nodes = 1
        made = Topology(num_replicas=replicas, num_gpus=ranks, num_groups=groups, num_nodes=nodes)
        made.check_experts(experts)
        return made

    def answer(
        self,
        history: Callable[[], Tensor],
        old: Tensor | None,
        topology: Topology,
        num_experts: int,
        group: distributed.ProcessGroup | None,
        *,
        compare: bool = True,
    ) -> Answer:
        """Plan, compare with the other ranks, and say what to deploy.

        Args:
            history: gives [n, L, E] or [L, E], any numbers; called once, and may raise.
            old: [L, P_old], the map in force; None: there is none.
            topology: P, D, G and N.
            num_experts: E.
            group: the ranks that share the experts; None with `compare`: the framework plans.
            compare: whether other ranks plan too.
        """
        started = time.perf_counter()
        compare = compare and self.settings.agree
        if compare and group is None and topology.num_gpus > 1:
            self.tell_once("no process group to compare plans over: the framework's own planner plans", logging.ERROR)
            return self._end(Answer(None, "own"), started)
        keepable = can_be_kept(old, topology, num_experts)
        kept = old if keepable else None
        loads = self._loads(history)  # where a stop file is too: other ranks may not see one, and histories stay alike
        stop = self._stop_asked()
        made = None if stop or loads is None else self._made(loads, old, topology, num_experts, keepable)
        verdict = self._verdict(made, stop, group if compare else None)
        if verdict.stopped:
            self.tell_once(f"stopped by {self.settings.stop_file}: the framework's own planner plans", logging.WARNING)
            return self._end(Answer(None, "stopped"), started)
        if not verdict.agreed or made is None:
            logger.error("rank %d: %s; %s", _rank(group), verdict.reason, _what_instead(kept))
            if (counters := prometheus()) is not None:
                counters.disagreements.labels(self.framework).inc()
            return self._end(Answer(kept, "kept" if keepable else "own", True), started)
        self._tell_of(made, old, keepable, started, group)
        if self.settings.shadow:
            return self._end(Answer(kept, "shadow"), started)
        return self._end(Answer(made.placement.phy2log, "deployed"), started)

    def tell_once(self, text: str, level: int = logging.WARNING) -> None:
        """Log a line that a process needs once."""
        with self._lock:
            if text in self._told:
                return
            self._told.add(text)
        logger.log(level, "%s: %s", self.framework, text)

    def warm(self) -> None:
        """Compile what the CPU needs, so that the first plan does not. Seconds where no cache is warm."""
        topology = Topology(num_replicas=6, num_gpus=2)
        try:
            for policy in {self.settings.policy.name, DEFAULT_POLICY}:
                planner = self._planner(
                    resolve_policy(policy), topology, 1, 4, torch.device("cpu"), self._backends()[0]
                )
                first = planner(torch.tensor([[4.0, 3, 2, 1]]))
                planner(torch.tensor([[1.0, 2, 3, 4]]), previous=first)
        except Exception:  # the first plan tries again, and then the reference
            logger.warning("%s: planning on the CPU could not be warmed up", self.framework, exc_info=True)

    def _loads(self, history: Callable[[], Tensor]) -> Tensor | None:
        """[n, L, E] that can be planned for, or None; never raises."""
        try:
            given = history()
            return self._usable(given if given.dim() == 3 else given.unsqueeze(0))
        except Exception:
            logger.exception("%s: there are no loads to plan for", self.framework)
            return None

    def _made(
        self, loads: Tensor, old: Tensor | None, topology: Topology, num_experts: int, keepable: bool
    ) -> Made | None:
        """A valid plan by the first backend that makes one, or None; never raises."""
        try:
            mean = loads.to(torch.float64).mean(0)
            if keepable and not bool(mean.any()):  # an idle window says nothing that is worth a move
                assert old is not None
                slots = old.to(loads.device, torch.int64).contiguous()
                return Made(Placement.from_phy2log(slots, num_experts, topology), mean, "none", "no load")
            before = fitted(old, topology, num_experts)
        except Exception:
            logger.exception("%s: the loads cannot be planned for", self.framework)
            return None
        for backend in self._backends(loads.device):
            try:
                return self._by(backend, loads, mean, before, topology)
            except Exception:
                logger.exception("%s: backend %s made no plan", self.framework, backend)
                if (counters := prometheus()) is not None:
                    counters.fallbacks.labels(self.framework).inc()
        return None

    def _by(self, backend: str, loads: Tensor, mean: Tensor, before: Tensor | None, topology: Topology) -> Made:
        policy = self.settings.policy
        num_layers, num_experts = mean.shape
        if policy.replan and before is not None and not can_be_replanned(before, num_experts, topology):
            policy = resolve_policy(DEFAULT_POLICY)  # a placement that no replanner can start from, as groups split
        planner = self._planner(policy, topology, num_layers, num_experts, loads.device, backend, loads)
        previous = None
        if before is not None:
            previous = Placement.from_phy2log(before.to(loads.device), num_experts, topology)
        limits = {"price": self.settings.price, "moves": self.settings.moves} if policy.replan else {}
        placement = planner(loads, previous=previous, **limits)  # type: ignore[arg-type]
        placement.validate()
        return Made(placement, mean, planner.backend, policy.name)

    def _planner(
        self,
        policy: Policy,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        device: torch.device,
        backend: str,
        loads: Tensor | None = None,
    ) -> Planner:
        steps, dtype = (1, torch.float32) if loads is None or device.type == "cpu" else (len(loads), loads.dtype)
        key = (policy.name, topology, num_layers, num_experts, device, backend, steps, dtype)
        with self._lock:
            found = self._planners.get(key)
        if found is None:
            found = Planner(
                topology,
                num_layers,
                num_experts,
                policy=policy,
                device=device,
                backend=backend,
                loads_dtype=dtype,
                steps=steps,
            )
        with self._lock:
            self._planners[key] = found
            self._planners.move_to_end(key)
            while len(self._planners) > MOST_PLANNERS:
                self._planners.popitem(last=False)
        return found

    def _backends(self, device: torch.device | str = "cpu") -> list[str]:
        """The backend asked for, then others of the same bits: one rank may go on with one alone."""
        asked = resolve_backend(self.settings.backend, torch.device(device))
        return list(dict.fromkeys((asked, resolve_backend("auto", torch.device("cpu")), "reference")))

    def _usable(self, loads: Tensor) -> Tensor:
        """Loads of which every bad one is 0; said once."""
        bad = ~((loads >= 0) & (loads <= MAX_LOAD))  # true for NaN
        if bool(bad.any()):
            self.tell_once("loads that are NaN, negative or above 2**100 count as 0")
            return loads.masked_fill(bad, 0)
        return loads

    def _stop_asked(self) -> bool:
        try:
            return self.settings.stop_asked()
        except OSError:  # a folder that has gone away asks nothing
            return False

    def _verdict(self, made: Made | None, stop: bool, group: distributed.ProcessGroup | None) -> Verdict:
        fingerprint = None
        if made is not None:
            try:
                fingerprint = made.placement.fingerprint()
            except Exception:
                logger.exception("%s: the plan has no fingerprint", self.framework)
        return agree(fingerprint, group, stop=stop)

    def _tell_of(
        self,
        made: Made,
        old: Tensor | None,
        keepable: bool,
        started: float,
        group: distributed.ProcessGroup | None,
    ) -> None:
        """One line on rank 0, and counters; a figure that cannot be had stops nothing."""
        try:
            placement, before = made.placement, None
            num_experts, topology = placement.num_experts, placement.topology
            slots, held = placement.phy2log.numel(), fitted(old, topology, num_experts)
            if held is not None:
                slots = int((placement.phy2log.to("cpu", torch.int64) != held).sum())
            if held is not None and keepable:
                live = Placement.from_phy2log(held.to(made.loads.device), num_experts, topology)
                before = live.balancedness(made.loads)
            after = placement.balancedness(made.loads)
            if (counters := prometheus()) is not None:
                counters.moved(self.framework, 0 if self.settings.shadow else slots, before, after)
            if _rank(group) == 0:
                logger.info(
                    "%s%s: policy=%s backend=%s %.1f ms balancedness %s -> %.4f, %d of %d slots, fingerprint=%s, "
                    "eplb_triton %s, specification %d",
                    self.framework,
                    " (shadow, nothing moves)" if self.settings.shadow else "",
                    made.policy,
                    made.backend,
                    1e3 * (time.perf_counter() - started),
                    "none" if before is None else f"{before:.4f}",
                    after,
                    slots,
                    placement.phy2log.numel(),
                    placement.fingerprint(),
                    __version__,
                    SPEC_VERSION,
                )
        except Exception:
            logger.exception("%s: the plan cannot be judged", self.framework)

    def _end(self, answer: Answer, started: float) -> Answer:
        if (counters := prometheus()) is not None:
            counters.planned(self.framework, answer.outcome, time.perf_counter() - started)
        return answer


def _rank(group: distributed.ProcessGroup | None) -> int:
    if group is not None:
        return group.rank()  # not distributed.get_rank(group), which knows no group that was made beside torch's own
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _what_instead(kept: Tensor | None) -> str:
    return "the framework's own planner plans" if kept is None else "the placement in force is kept"
