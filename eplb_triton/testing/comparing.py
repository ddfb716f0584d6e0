"""Whether two placements are the same: to the bit, or but for what does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.placement import Placement
from eplb_triton.topology import Topology

MAPS = ("phy2log", "phyrank", "logcnt")


def canonical(phy2log: Tensor, topology: Topology) -> Tensor:
    """The map [L, P] without what does not matter: experts of a GPU ascending, and GPUs of a node by their experts."""
    layers = phy2log.shape[0]
    nodes, gpus = topology.planned_nodes, topology.gpus_per_node
    held = phy2log.reshape(layers * nodes, gpus, topology.slots_per_gpu).sort(dim=2).values
    order = torch.arange(gpus, dtype=torch.int64, device=held.device).expand(layers * nodes, gpus)
    for slot in reversed(range(held.shape[2])):  # stable sorts from the last column to the first
        column = held[:, :, slot].gather(1, order)
        order = order.gather(1, column.argsort(dim=1, stable=True))
    return held.gather(1, order.unsqueeze(2).expand_as(held)).reshape(layers, -1)


def same_placement(got: Placement, want: Placement, *, exact: bool = False) -> bool:
    """Whether two placements put the same experts together.

    Args:
        got: one.
        want: the other.
        exact: whether slots, GPUs and ranks must bear the same numbers too, which is what the backends of this library
            promise each other. Without, the numbering of the slots of a GPU and of the GPUs of a node is free, as
            between two planners that break ties in another order.
    """
    return first_difference(got, want, exact=exact) is None


def first_difference(got: Placement, want: Placement, *, exact: bool = False) -> str | None:
    """What the first difference of two placements is, in one line, or None; `exact` as in `same_placement`."""
    if got.topology != want.topology:
        return f"topology is {got.topology}, not {want.topology}"
    if got.logcnt.shape != want.logcnt.shape:
        return f"[layers, experts] is {list(got.logcnt.shape)}, not {list(want.logcnt.shape)}"
    pairs = {name: (getattr(got, name).cpu().long(), getattr(want, name).cpu().long()) for name in MAPS}
    if not exact:
        pairs = {
            "logcnt": pairs["logcnt"],
            "canonical phy2log": (
                canonical(pairs["phy2log"][0], got.topology),
                canonical(pairs["phy2log"][1], got.topology),
            ),
        }
    for name, (mine, its) in pairs.items():
        differs = mine != its
        if bool(differs.any()):
            layer, at = differs.nonzero()[0].tolist()
            where = "expert" if name == "logcnt" else "slot"
            return (
                f"{name}[layer {layer}, {where} {at}] is {int(mine[layer, at])}, not {int(its[layer, at])}; "
                f"{int(differs.sum())} values in {int(differs.any(1).sum())} of {len(differs)} layers differ"
            )
    return None
