"""Whose plans the serving simulation judges, by name: every policy of ours, and every peer that can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from bench.planners.ours import Planner as Peer
from bench.planners.ours import Skip, one_line, probe
from bench.planners.peers import peers
from eplb_triton import POLICIES, Placement, Planner, Topology
from eplb_triton.replay import Plan

Row = dict[str, Any]
LAST = 1024
"""Steps whose sum a planner gets that does not replan."""
KEPT = "+previous"
"""Behind a policy's name: its plan, renumbered so that weights stay where they can."""
OURS = (*POLICIES, *(f"{policy}{KEPT}" for policy in ("deepseek", "balanced")))


@cache
def loaded_peers() -> tuple[dict[str, Peer], list[Skip]]:
    """Peers by name, and why others take no part."""
    found, skips = peers()
    working, broken = probe(found)
    return {peer.name: peer for peer in working}, [*skips, *broken]


def planner_of(name: str, topology: Topology, num_experts: int, price: float | None, steps: int) -> Plan:
    """The planner of that name; `price` and `steps` are for a policy that replans.

    Raises:
        ValueError: nobody has that name.
    """
    if name in OURS:
        return ours(name, topology, num_experts, price, steps)
    found, _ = loaded_peers()
    if name not in found:
        raise ValueError(f"planner={name!r} is unknown, must be one of {', '.join((*OURS, *found))}")
    return of_peer(found[name], topology)


def tried(name: str, where: str, judged: Callable[[], Row]) -> Row | Skip:
    """The row of a planner, or why there is none: a peer may raise anything, and becomes a line of the report."""
    try:
        return judged()
    except Exception as error:
        if name in OURS:
            raise
        return Skip(name, one_line(error), where)


def ours(name: str, topology: Topology, num_experts: int, price: float | None, steps: int) -> Plan:
    """A policy: one that replans gets the newest `steps` and what is in force, the others the last 1024."""
    policy, kept, _ = name.partition(KEPT)
    planners: dict[int, Planner] = {}

    def plan(history: Tensor, live: Placement | None) -> Placement:
        layers = history.shape[1]
        if layers not in planners:
            planners[layers] = Planner(topology, layers, num_experts, policy=policy, device="cpu")
        if POLICIES[policy].replan:
            return planners[layers](history[-steps:], previous=live, price=price if live is not None else None)
        return planners[layers](history[-LAST:], previous=live if kept else None)

    return plan


def of_peer(peer: Peer, topology: Topology) -> Plan:
    """A published planner, on the sum of the last 1024 steps, and on what is in force if it asks for that."""
    return lambda history, live: peer.placement(history[-LAST:].sum(0).float(), topology, live)
