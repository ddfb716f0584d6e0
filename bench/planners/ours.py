"""Planners behind one signature: ours, one a policy and backend; `bench.planners.peers` adds what others publish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eplb_triton import POLICIES, Placement, Topology, plan, rebalance_experts
from eplb_triton.backends import BACKENDS

Call = Callable[[], Any]
SOURCE = "eplb_triton"
"""Where our own planners come from."""
PUBLISHED = "deepseek"
"""The published DeepSeek algorithm; planners of it are compared map by map."""


@dataclass(frozen=True)
class Planner:
    """Something that plans.

    Args:
        name: unique; `--planners` and the report call it so.
        algorithm: planners of one algorithm should give the same maps.
        bind: makes of loads [L, E] float32 on the CPU, and a topology, the call that is timed; converting the
            loads to what the planner takes happens here, outside the timing.
        maps: phy2log [L, P] int64 on the CPU of what the call returned; outside the timing too.
        takes: what the timed call is given.
        gives: what the timed call returns.
        source: package and version, for peers.
        bind_after: as `bind`, of a planner that asks for the placement in force too; None: it asks for none.
    """

    name: str
    algorithm: str
    bind: Callable[[Tensor, Topology], Call]
    maps: Callable[[Any], Tensor]
    takes: str
    gives: str
    source: str = SOURCE
    bind_after: Callable[[Tensor, Topology, Placement], Call] | None = None

    def placement(self, loads: Tensor, topology: Topology, previous: Placement | None = None) -> Placement:
        """One plan as a Placement, made from `previous` by a planner that asks for what is in force.

        Its replica ranks are by slot order, whatever the planner said.
        """
        if previous is None or self.bind_after is None:
            call = self.bind(loads, topology)
        else:
            call = self.bind_after(loads, topology, previous)
        return as_placement(self, call(), loads.shape[1], topology)


@dataclass(frozen=True)
class Skip:
    """A planner that took no part, and why."""

    planner: str
    reason: str
    case: str = ""


def as_placement(planner: Planner, result: Any, num_experts: int, topology: Topology) -> Placement:
    """The Placement of what a call of `planner` returned; `num_experts` is E.

    Raises:
        ValueError: it is no placement of that topology.
    """
    return Placement.from_phy2log(planner.maps(result), num_experts, topology, planner.name)


def ours() -> list[Planner]:
    """`deepseek` on every backend, and every policy; `auto` takes the best backend there is.

    Planners of the `triton` backend are given loads that already are on the GPU, where there is one.
    """
    concrete = [backend for backend in BACKENDS if backend != "auto"]
    found = [_ours(policy, backend) for policy in POLICIES for backend in concrete]
    found.append(
        Planner(
            f"{PUBLISHED}@auto+log2phy",
            PUBLISHED,
            lambda loads, topology: lambda: rebalance_experts(loads, *_counts(topology)),
            lambda result: result[0],
            "[L, E] float32",
            "phy2log, log2phy, logcnt (rebalance_experts)",
        )
    )
    return found


def _counts(topology: Topology) -> tuple[int, int, int, int]:
    return topology.num_replicas, topology.num_groups, topology.num_nodes, topology.num_gpus


def _ours(policy: str, backend: str) -> Planner:
    on_gpu = backend == "triton" and torch.cuda.is_available()

    def bind(loads: Tensor, topology: Topology) -> Call:
        if not on_gpu:
            return lambda: plan(loads, topology, policy=policy, backend=backend)
        there = loads.cuda()

        def call() -> Placement:
            placement = plan(there, topology, policy=policy, backend=backend)
            torch.cuda.synchronize()
            return placement

        return call

    takes = "[L, E] float32 on the GPU, synchronised after the call" if on_gpu else "[L, E] float32"
    return Planner(f"{policy}@{backend}", policy, bind, _phy2log, takes, "Placement: phy2log, phyrank, logcnt")


def _phy2log(placement: Placement) -> Tensor:
    return placement.phy2log.cpu()


def probe(planners: Sequence[Planner]) -> tuple[list[Planner], list[Skip]]:
    """Those that plan a small example, and why the others do not. Compiles what is compiled at a first call."""
    loads = torch.arange(1, 25, dtype=torch.float32).reshape(2, 12)
    working, skips = [], []
    for planner in planners:
        try:
            planner.placement(loads, Topology(num_replicas=16, num_gpus=8))
        except Exception as error:  # a peer may raise anything; every one becomes a line of the report
            skips.append(Skip(planner.name, one_line(error)))
        else:
            working.append(planner)
    return working, skips


def one_line(error: Exception) -> str:
    """Type and first line of an error, for a line of the report."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def best_backend(planners: Sequence[Planner]) -> str:
    """The backend whose planners stand for a policy where one line a policy is wanted: `cpu`, else `reference`."""
    backends = {planner.name.partition("@")[2] for planner in planners}
    return "cpu" if "cpu" in backends else "reference"
