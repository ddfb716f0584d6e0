"""What is always true of a plan, checked: the first layer and slot that breaks a rule is named. Waits for a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eplb_triton.checks import check_map
from eplb_triton.loads import bad_load
from eplb_triton.replan_status import FINE, STATUS_WORDS
from eplb_triton.status import GOOD, NO_ROOM
from eplb_triton.topology import check_topology

if TYPE_CHECKING:
    from eplb_triton.placement import Placement
    from eplb_triton.topology import Topology


def check_placement(placement: Placement) -> None:
    """Refuse a placement that breaks a rule: see `Placement.validate`."""
    topology, layers, experts = placement.topology, placement.num_layers, placement.num_experts
    topology.check_experts(experts)
    for name in ("phy2log", "phyrank", "logcnt"):
        check_map(name, getattr(placement, name), "[layers, replicas]" if name != "logcnt" else "[layers, experts]")
    for name, slots in (("phy2log", placement.phy2log), ("phyrank", placement.phyrank)):
        if tuple(slots.shape) != (layers, topology.num_replicas):
            raise ValueError(
                f"{name} has shape {tuple(slots.shape)}, must be "
                f"[layers={placement.logcnt.shape[0]}, num_replicas={topology.num_replicas}]"
            )
    if placement.logcnt.shape[0] != layers:
        raise ValueError(f"logcnt has {placement.logcnt.shape[0]} layers, must have {layers} like phy2log")
    check_experts_of_slots(placement.phy2log, experts)
    _check_counts(placement)
    _check_ranks(placement)
    if topology.hierarchical:
        _check_groups(placement)


def check_experts_of_slots(phy2log: Tensor, num_experts: int, *, lowest: int = 0) -> None:
    """Refuse a slot whose expert is outside `lowest` … E - 1.

    Raises:
        ValueError: names the first layer and slot.
    """
    if (bad := _first((phy2log < lowest) | (phy2log >= num_experts))) is not None:
        raise ValueError(
            f"layer {bad[0]}, slot {bad[1]}: phy2log names expert {int(phy2log[bad])}, "
            f"must be {lowest} to {num_experts - 1}"
        )


def check_slot_map(phy2log: Tensor, num_experts: int, topology: Topology) -> None:
    """Refuse what is no slot map [L, P] of experts -1 … E - 1: see `Placement.from_phy2log`."""
    check_topology(topology)
    check_map("phy2log", phy2log, "[layers, replicas]")
    if phy2log.shape[1] != topology.num_replicas:
        raise ValueError(
            f"phy2log has shape {tuple(phy2log.shape)}, must be [layers, num_replicas={topology.num_replicas}]"
        )
    check_experts_of_slots(phy2log, num_experts, lowest=-1)


def check_alike(placement: Placement, previous: Placement) -> None:
    """Refuse to compare placements that differ in layers, experts, replicas or GPUs.

    Raises:
        ValueError: names the first count that differs.
    """
    for name, mine, other in (
        ("layers", placement.num_layers, previous.num_layers),
        ("experts", placement.num_experts, previous.num_experts),
        ("replicas", placement.topology.num_replicas, previous.topology.num_replicas),
        ("GPUs", placement.topology.num_gpus, previous.topology.num_gpus),
    ):
        if mine != other:
            raise ValueError(f"previous has {other} {name}, must have {mine} like this placement")


def check_commit(live: Placement, ahead: Placement) -> None:
    """Refuse to copy `ahead` into `live` where that cannot hold it: see `Placement.copy_`."""
    if (live.topology, live.logcnt.shape) != (ahead.topology, ahead.logcnt.shape):
        raise ValueError(
            f"other is of {ahead.topology} and [layers, experts] = {list(ahead.logcnt.shape)}, must be of "
            f"{live.topology} and {list(live.logcnt.shape)}"
        )
    if live.log2phy is not None and (ahead.log2phy is None or ahead.log2phy.shape[2] > live.log2phy.shape[2]):
        has = "None" if ahead.log2phy is None else f"of width {ahead.log2phy.shape[2]}"
        raise ValueError(f"other.log2phy is {has}, must be of a width of at most {live.log2phy.shape[2]}")


def need_every_expert(placement: Placement, what: str) -> None:
    """Refuse a placement that lacks experts, for `what` needs all of them.

    Raises:
        ValueError: names the first expert without a replica, or the first slot without an expert.
    """
    if not placement.partial:
        return
    if (bad := _first(placement.logcnt == 0)) is not None:
        raise ValueError(f"layer {bad[0]}: expert {bad[1]} has no replica, must have one for {what}")
    if (bad := _first(placement.phy2log < 0)) is not None:
        raise ValueError(f"layer {bad[0]}, slot {bad[1]} holds no expert, must hold one for {what}")


def refuse_bad(placement: Placement, loads: Tensor | None = None) -> None:
    """Refuse a plan that did not come out as asked, naming a value of `loads`: see `Placement.raise_if_bad`."""
    if placement.changes is not None:
        refuse_previous(placement.changes.status.cpu())
    status = None if placement.bad is None else placement.bad.cpu()
    if status is None or bool((status == GOOD).all()):
        return
    if (layers := (status >= 0).any(1).nonzero()).numel():
        layer = int(layers[0])
        expert = int(status[layer][status[layer] >= 0].min())
        raise bad_load(loads, (layer, expert), name="loads")
    layer = int((status == NO_ROOM).any(1).nonzero()[0])
    assert placement.log2phy is not None
    count, width = placement.logcnt[layer], placement.log2phy.shape[2]
    raise ValueError(
        f"log2phy has room for {width} replicas of an expert, must have for {int(count.amax())}: so many has expert "
        f"{int(count.argmax())} of layer {layer}; num_replicas - num_experts + 1 is always enough"
    )


def refuse_previous(status: Tensor) -> None:
    """Refuse a placement in force that cannot be planned on. Waits for a GPU.

    Raises:
        ValueError: names the first layer whose `status` [L] is none of FINE, and why.
    """
    if (bad := _first(status != FINE)) is not None:
        raise ValueError(f"layer {bad[0]} of previous {STATUS_WORDS[int(status[bad])]}; nothing was planned")


def _check_counts(placement: Placement) -> None:
    logcnt = placement.logcnt.long()
    experts = placement.phy2log.long()
    held = torch.zeros_like(logcnt).scatter_add_(1, experts, torch.ones_like(experts))
    if (bad := _first(held == 0)) is not None:
        raise ValueError(f"layer {bad[0]}: expert {bad[1]} has no replica, must have at least one")
    if (bad := _first(held != logcnt)) is not None:
        count, stands = int(held[bad]), int(logcnt[bad])
        raise ValueError(f"layer {bad[0]}: expert {bad[1]} fills {count} slots, but logcnt says {stands}")


def _check_ranks(placement: Placement) -> None:
    experts, rank = placement.phy2log.long(), placement.phyrank.long()
    count = placement.logcnt.long().gather(1, experts)
    if (bad := _first((rank < 0) | (rank >= count))) is not None:
        raise ValueError(
            f"layer {bad[0]}, slot {bad[1]}: phyrank {int(rank[bad])} must be at least 0 and below the "
            f"{int(count[bad])} replicas of its expert {int(experts[bad])}"
        )
    key, slot = (experts * placement.topology.num_replicas + rank).sort(dim=1, stable=True)
    repeated = torch.zeros_like(key, dtype=torch.bool)
    repeated.scatter_(1, slot[:, 1:], key[:, 1:] == key[:, :-1])
    if (bad := _first(repeated)) is not None:
        raise ValueError(
            f"layer {bad[0]}, slot {bad[1]}: replica {int(rank[bad])} of expert {int(experts[bad])} "
            "is in an earlier slot too, must be in one"
        )


def _check_groups(placement: Placement) -> None:
    topology = placement.topology
    group = placement.phy2log.long() // (placement.num_experts // topology.num_groups)
    slots = torch.arange(topology.num_replicas, dtype=torch.int64, device=group.device)
    node = (slots // topology.replicas_per_node).expand_as(group)
    nowhere = topology.num_nodes
    home = torch.full((placement.num_layers, topology.num_groups), nowhere, dtype=torch.int64, device=group.device)
    home.scatter_reduce_(1, group, node, "amin")
    if (bad := _first(node != home.gather(1, group))) is not None:
        raise ValueError(
            f"layer {bad[0]}, slot {bad[1]}: expert {int(placement.phy2log[bad])} of group {int(group[bad])} is on "
            f"node {int(node[bad])}, but the group is on node {int(home[bad[0], group[bad]])}; must stay on one"
        )


def _first(broken: Tensor) -> tuple[int, ...] | None:
    """Index of the first True of `broken`, or None."""
    where = broken.nonzero()
    return tuple(where[0].tolist()) if len(where) else None
