"""What a kernel is compiled for, as one frozen value of plain fields: Triton's cache knows a kernel by its `repr`.

`num_*` are counts; `*_lanes` are widths of tiles, powers of two of at least a warp and at least the count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton

from eplb_triton.constants import EXCHANGES_PER_ITEM, num_partners, num_proposers
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Corner, Counts, Exchange, Fixup, GpuPack, GroupPack, Nearest, Paired, Peak, Policy
from eplb_triton.topology import Topology

ROUNDS_FROM = 32  # GPUs a row from which packing in rounds beats one item a step (cycles from SASS)
WIDE_FROM = 128
"""GPUs a row from which exchanges take 16 warps: with pairs by expert 512 -> 1024 takes 127 us, was 201 (estimated)."""
MOST_MEETINGS, WIDE_MEETINGS = 256, 1024  # 2 a thread: at 4 a row of 1,024 replicas spills 8 bytes, at 8 it spills 288
AT_ONCE_FROM = 32  # redundant replicas a row from which D'Hondt picks by threshold beat one pick a step

Rule = Literal["none", "nearest", "corner", "peak", "exchange"]


@dataclass(frozen=True)
class Packing:
    """Items of a row into packs of equal size: groups onto nodes, replicas onto GPUs."""

    num_items: int
    num_packs: int
    item_lanes: int
    pack_lanes: int
    slot_lanes: int
    in_rounds: bool = False
    looped_sorts: bool = False  # as of `sort_descending`


@dataclass(frozen=True)
class Refining:
    """Swaps after a packing; of `exchange` its own fields are elsewhere."""

    rule: Rule = "none"
    steps: int = 0
    lights: int = 0


@dataclass(frozen=True)
class Replicating:
    """Experts of a row to replicas."""

    num_experts: int
    num_replicas: int
    num_packs: int
    expert_lanes: int
    replica_lanes: int
    pick_lanes: int
    at_once: bool


@dataclass(frozen=True)
class Moving:
    """Fix-up by single replicas."""

    moves: int = 0
    donors: str = "top"
    peak: str = "others"
    tie: str = "first"


@dataclass(frozen=True)
class Pairing:
    """Fix-up where GPUs have two slots."""

    moves: int = 0
    donors: int = 0


@dataclass(frozen=True)
class Exchanging:
    """Exchange of replicas; `partners`: the lightest packs that an exchange of two for two tries, 0: none."""

    pair_rounds: int
    match_rounds: int
    proposers: int
    meetings: int
    double_steps: int
    partners: int
    candidate_lanes: int


@dataclass(frozen=True)
class Partitioning:
    """The partitions of the groups that are tried, 0 if they are too many, and the exchange that then follows."""

    ways: int
    way_lanes: int
    exchange: Exchanging


@dataclass(frozen=True)
class Stages:
    """A policy, in the order of the stages."""

    group_pack: GroupPack
    group_refine: Refining
    counts: Counts
    moving: Moving
    pairing: Pairing
    gpu_pack: GpuPack
    gpu_refine: Refining


@dataclass(frozen=True)
class Shape:
    """One row's sizes, its policy, and how its scratch and its maps lie."""

    num_experts: int  # E, of a layer
    num_replicas: int  # P, of a layer
    num_nodes: int
    groups: Packing
    partition: Partitioning
    experts: Replicating
    replicas: Packing
    exchange: Exchanging
    policy: Stages
    log2phy_width: int
    log2phy_lanes: int
    scratch: int  # elements of one scratch array of a row


def starts_of(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where arrays of these sizes begin one after the other, multiples of 4 elements, and where the last one ends."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // 4) * 4
    return starts, end


def shape_of(topology: Topology, num_experts: int, policy: Policy, log2phy_width: int, lanes: int) -> Shape:
    """The shape of loads [L, num_experts]; `lanes`: threads of a warp."""

    def padded(size: int) -> int:
        return max(lanes, int(triton.next_power_of_2(size)))

    def packing(items: int, packs: int, in_rounds: bool) -> Packing:
        return Packing(items, packs, padded(items), padded(packs), padded(items // packs), in_rounds, looped_sorts)

    looped_sorts = policy.replan is not None  # it makes a plan from nothing once in many
    nodes, gpus = topology.planned_nodes, topology.gpus_per_node
    groups = packing(topology.planned_groups, nodes, nodes > 32)
    replicas = packing(topology.replicas_per_node, gpus, gpus >= ROUNDS_FROM)
    redundant = (topology.num_replicas - num_experts) // nodes
    fixup = policy.fixup
    return Shape(
        num_experts=num_experts,
        num_replicas=topology.num_replicas,
        num_nodes=nodes,
        groups=groups,
        partition=_partitioning(policy, groups, lanes),
        experts=Replicating(
            num_experts // nodes,
            replicas.num_items,
            gpus,
            padded(num_experts // nodes),
            replicas.item_lanes,
            padded(redundant),
            redundant >= AT_ONCE_FROM,
        ),
        replicas=replicas,
        exchange=_exchanging(
            policy.gpu_refine if isinstance(policy.gpu_refine, Exchange) else Exchange(0, 0),
            gpus,
            topology.slots_per_gpu,
            lanes,
        ),
        policy=Stages(
            group_pack=policy.group_pack,
            group_refine=_refining(policy.group_refine),
            counts=policy.counts,
            moving=Moving(fixup.moves, fixup.donors, fixup.peak, fixup.tie) if isinstance(fixup, Fixup) else Moving(),
            pairing=Pairing(fixup.moves, fixup.donors) if isinstance(fixup, Paired) else Pairing(),
            gpu_pack=policy.gpu_pack,
            gpu_refine=_refining(policy.gpu_refine),
        ),
        log2phy_width=log2phy_width,
        log2phy_lanes=int(triton.next_power_of_2(log2phy_width)),
        scratch=max(replicas.item_lanes, groups.item_lanes) + 64,
    )


def _partitioning(policy: Policy, groups: Packing, lanes: int) -> Partitioning:
    ways = len(partitions_to_try(groups.num_items, groups.num_packs)) if policy.group_pack == "partition" else 0
    exchange = Exchange(0, EXCHANGES_PER_ITEM * groups.num_items, proposers=1)
    return Partitioning(
        ways, max(lanes, int(triton.next_power_of_2(ways))), _exchanging(exchange, groups.num_packs, 1, lanes)
    )


def _exchanging(exchange: Exchange, packs: int, capacity: int, lanes: int) -> Exchanging:
    proposers = num_proposers(exchange.proposers, packs)
    partners = num_partners(exchange.candidates, capacity, packs)
    candidates = max(1, partners * capacity * (capacity - 1) // 2)
    return Exchanging(
        pair_rounds=exchange.pair_rounds,
        match_rounds=exchange.match_rounds,
        proposers=proposers,
        meetings=_meetings(proposers, packs, lanes),
        double_steps=exchange.double_steps,
        partners=partners,
        candidate_lanes=max(lanes, int(triton.next_power_of_2(candidates))),
    )


def _meetings(proposers: int, packs: int, lanes: int) -> int:
    """Meetings of a match round valued at once: all, or as many as registers hold, at least those of one proposer."""
    partners = int(triton.next_power_of_2(packs))
    all_of_them = partners * int(triton.next_power_of_2(max(1, proposers)))
    most = WIDE_MEETINGS if packs >= WIDE_FROM else MOST_MEETINGS
    return max(lanes, partners, min(most, all_of_them))


def _refining(choice: Nearest | Corner | Peak | Exchange | None) -> Refining:
    rules: dict[type, Rule] = {Nearest: "nearest", Corner: "corner", Peak: "peak", Exchange: "exchange"}
    if choice is None:
        return Refining()
    return Refining(rules[type(choice)], getattr(choice, "steps", 0), getattr(choice, "lights", 0))
