"""Deployments side by side on the same steps: without plans, with one, with many, with some that know what comes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from eplb_triton import Placement, Planner, Topology
from eplb_triton.formats import StepStream
from eplb_triton.policy import DEFAULT_REPLAN_POLICY, resolve_policy
from eplb_triton.replay import EVEN, Costs, Deployment, Foresight, History, Plan, Rules, Step, Tally
from eplb_triton.replay.splits import TABLE_STEPS

UNPLANNED = "experts in order"
KEPT = ", one plan kept"
"""What follows the policy in the name of a deployment that plans once."""
FORESIGHT = "next steps known"
WINDOW = 1024
"""Steps that a policy looks back on which levels their sum."""
REPLAN_WINDOW = 256
"""Steps that a policy looks back on which replans, or as many as the plan is for: more gained nothing in the serving
study, whose traffic drifts, and fewer are not 8 for each of its 32 samples."""


@dataclass(frozen=True)
class Setting:
    """One way to run a deployment.

    Args:
        topology: replicas, GPUs, groups and nodes.
        interval: steps between the end of a deployment and the next plan.
        costs: what a written slot must save follows from it.
        window: steps that plans look back on; None: `WINDOW`, or for a policy that replans the interval, at
            least `REPLAN_WINDOW`.
        layer_steps: steps that the deployment of a layer takes; 0: plans are in force at once.
        backend: as in `Planner`.
        start: in force at first; None: `in_order`.
        least_load: as of `Rules`.
        price_times: what the price that follows from the costs is multiplied by.
        judged_from: steps at the beginning that are served but not judged, nor their moves counted.
    """

    topology: Topology
    interval: int
    costs: Costs
    window: int | None = None
    layer_steps: float = 1.0
    backend: str = "auto"
    start: Placement | None = None
    least_load: float = 0.0
    price_times: float = 1.0
    judged_from: int = 0

    @property
    def price(self) -> float:
        """What a written slot must save, a share of the mean GPU load."""
        return self.costs.price(self.interval) * self.price_times

    def looks_back(self, policy: str) -> int:
        """Steps that a plan of `policy` is made from, at most."""
        return self.window or (max(REPLAN_WINDOW, self.interval) if replans(policy) else WINDOW)

    def rules(self, policy: str, *, once: bool = False) -> Rules:
        """When `policy` plans."""
        return Rules(self.interval, self.looks_back(policy), self.layer_steps, self.least_load, once)

    def plan(self, policy: str, num_layers: int, num_experts: int, *, price: float | None = None) -> Plan:
        """What plans by `policy`: from what is in force where it replans, at this setting's price or another."""
        planner = Planner(self.topology, num_layers, num_experts, policy=policy, device="cpu", backend=self.backend)
        if not replans(policy):
            return lambda history, live: planner(history)
        price = self.price if price is None else price
        return lambda history, live: planner(history, previous=live, price=None if live is None else price)


@dataclass
class Outcome:
    """What one deployment did.

    Args:
        name: a policy, alone or with `KEPT`, or `UNPLANNED` or `FORESIGHT`.
        policy: what planned; None: nothing.
        setting: how it was run.
        tallies: of every split.
        slots: [buckets], slots written over time.
        written: slots written, of all layers, since steps are judged; `plans` made alike.
        plan_seconds: of every plan.
        placement: in force at the end.
    """

    name: str
    policy: str | None
    setting: Setting
    tallies: dict[str, Tally]
    slots: NDArray[np.int64]
    written: int = 0
    plans: int = 0
    plan_seconds: list[float] = field(default_factory=list)
    placement: Placement | None = None

    def add(self, step: Step) -> None:
        """Count a step in."""
        even = self.tallies[EVEN]
        self.slots[even.bucket_of(even.steps)] += step.written
        if even.steps >= self.setting.judged_from:
            self.written += step.written
            self.plans += step.planned > 0
        if step.planned:
            self.plan_seconds.append(step.planned)
        for split, tally in self.tallies.items():
            tally.add(step.gpu_loads[split])

    @property
    def slots_a_plan(self) -> float:
        """Slots written a layer and plan."""
        return self.written / max(1, self.plans) / len(self.tallies[EVEN].by_layer)

    @property
    def plan_ms(self) -> float:
        """Milliseconds that a plan took, the median."""
        return 1e3 * statistics.median(self.plan_seconds) if self.plan_seconds else 0.0

    def seconds(self, split: str = EVEN) -> float:
        """Modelled time of the expert layers, with the moves; but those of plans that nobody can make are free."""
        costs = self.setting.costs
        moving = 0.0 if self.name == FORESIGHT else costs.moving(self.written)
        return costs.serving(self.tallies[split].par) + moving

    def saved(self, base: Outcome, split: str = EVEN) -> float:
        """The share of the time of `base`, whose tokens are split evenly, that this saves."""
        return 1 - self.seconds(split) / base.seconds() if base.seconds() else 0.0

    def paid_back(self, base: Outcome) -> float:
        """Steps after which the moves of one plan have paid: what it writes in all layers against the fall of a step's
        PAR from that of `base`."""
        layers = len(self.tallies[EVEN].by_layer)
        fall = (base.tallies[EVEN].mean - self.tallies[EVEN].mean) * layers
        return self.setting.costs.paid_back(self.written / max(1, self.plans), fall)


class _Run:
    """A deployment and what is noted of it."""

    def __init__(self, server: Deployment | Foresight, outcome: Outcome) -> None:
        self._server, self.outcome = server, outcome

    def serve(self, loads: torch.Tensor) -> None:
        self._note(self._server.serve(loads))

    def finish(self) -> None:
        self._note(self._server.finish())
        self.outcome.placement = self._server.live

    def _note(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.outcome.add(step)


def replay_all(
    stream: StepStream, settings: Sequence[tuple[Setting, str]], splits: Sequence[str], advance: Callable[[], None]
) -> list[Outcome]:
    """Serve all steps, once, by every deployment.

    Args:
        stream: the steps.
        settings: of each deployment its setting and its name, see `Outcome`; `FORESIGHT` plans by
            `DEFAULT_REPLAN_POLICY`.
        splits: how tokens are split, `EVEN` first.
        advance: called after each step.

    Returns:
        An outcome each, in their order.

    Raises:
        ValueError: a load that nobody can plan with, or counts that do not fit.
    """
    history = History(max(TABLE_STEPS, *(setting.looks_back(policy_of(name)) for setting, name in settings)))
    runs = [_begun(stream, setting, name, history, splits) for setting, name in settings]
    with _one_thread():
        for loads in stream:
            history.add(loads)
            for run in runs:
                run.serve(loads)
            advance()
        for run in runs:
            run.finish()
    return [run.outcome for run in runs]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A step is a hundred calls of 10 to 700 us each: a second thread costs more than it gives, twice as much where
    other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def policy_of(name: str) -> str:
    """The policy that plans a deployment of this name."""
    return DEFAULT_REPLAN_POLICY if name in (UNPLANNED, FORESIGHT) else name.removesuffix(KEPT)


def plans_on(name: str) -> bool:
    """Whether a deployment of this name can be had, and plans again and again."""
    return name not in (UNPLANNED, FORESIGHT) and not name.endswith(KEPT)


def replans(policy: str) -> bool:
    """Whether a policy plans from what is in force."""
    return resolve_policy(policy).replan is not None


def _begun(stream: StepStream, setting: Setting, name: str, history: History, splits: Sequence[str]) -> _Run:
    layers, experts = stream.num_layers, stream.num_experts
    start = setting.start or in_order(layers, experts, setting.topology)
    policy = policy_of(name)
    shape = stream.length, layers, setting.topology.num_gpus
    tallies = {
        split: Tally(*shape, heat=split == EVEN and len(splits) > 1, skip=setting.judged_from) for split in splits
    }
    outcome = Outcome(
        name, None if name == UNPLANNED else policy, setting, tallies, np.zeros(tallies[EVEN].buckets, np.int64)
    )
    if name == FORESIGHT:
        free = setting.plan(policy, layers, experts, price=0.0)
        return _Run(Foresight(start, free, setting.interval, splits, setting.least_load), outcome)
    plan = None if name == UNPLANNED else setting.plan(policy, layers, experts)
    return _Run(Deployment(start, plan, setting.rules(policy, once=name.endswith(KEPT)), history, splits), outcome)


def in_order(num_layers: int, num_experts: int, topology: Topology) -> Placement:
    """The unplanned state: slot k of a node holds expert k mod E / N of the node's, so that groups are whole; with one
    node, or in global planning, slot k holds expert k mod E."""
    nodes, slots = topology.planned_nodes, topology.replicas_per_node
    on_node = torch.arange(slots) % (num_experts // nodes)
    held = torch.arange(nodes).unsqueeze(1) * (num_experts // nodes) + on_node
    return Placement.from_phy2log(held.flatten().repeat(num_layers, 1), num_experts, topology, UNPLANNED)


def first_tokens(stream: StepStream, most: int) -> tuple[float, bool]:
    """Loads of a layer and step, the mean of the first `most` steps, and whether all of them are whole numbers."""
    total, count, whole = 0.0, 0, True
    for loads in stream:
        total += float(loads.sum())
        whole = whole and bool((loads == loads.floor()).all()) if loads.is_floating_point() else whole
        count += 1
        if count == most:
            break
    return total / max(1, count * stream.num_layers), whole
