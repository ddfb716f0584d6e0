"""Placement: which expert sits in which physical slot, and what one asks of that."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from eplb_triton.bound import lower_bound
from eplb_triton.topology import Topology

BALANCEDNESS = "balancedness = mean GPU load summed over layers / max GPU load summed over layers"


class Moved(NamedTuple):
    """What changes from one placement to the next, per layer."""

    slots: Tensor  # [L] int64, physical slots whose expert changed
    fetches: Tensor  # [L] int64, experts that a GPU must fetch, over all GPUs: it did not hold them before


@dataclass(frozen=True, eq=False)
class Placement:
    """The maps of a plan. The constructor checks nothing; `validate` checks everything.

    Args:
        phy2log: [L, P] int64 (or int32, as all maps), expert in each physical slot; slot k is on GPU k // S, S = P / D.
        phyrank: [L, P] int64, which of its expert's replicas each slot holds, counted from 0.
        logcnt: [L, E] int64, replicas of each expert.
        topology: the counts it was planned for.
        policy: name of the policy that planned it.
        bad: [L, N] int32 on the GPU that planned it, lowest expert of each row whose load was bad and counted as 0,
            or -1; None where bad loads were refused. Reading it waits for the GPU.
    """

    phy2log: Tensor
    phyrank: Tensor
    logcnt: Tensor
    topology: Topology
    policy: str
    bad: Tensor | None = None

    @classmethod
    def from_phy2log(cls, phy2log: Tensor, num_experts: int, topology: Topology, policy: str = "custom") -> Placement:
        """A placement from the slot map alone; replicas of an expert are ranked in slot order.

        Raises:
            ValueError: `phy2log` is not [L, P], or names an expert outside 0 … num_experts - 1.
        """
        phy2log = phy2log.to(torch.int64)
        if phy2log.dim() != 2 or phy2log.shape[1] != topology.num_replicas:
            raise ValueError(
                f"phy2log has shape {tuple(phy2log.shape)}, must be [layers, num_replicas={topology.num_replicas}]"
            )
        _check_range("phy2log", phy2log, num_experts)
        by_expert = phy2log.argsort(dim=1, stable=True)
        logcnt = torch.zeros(phy2log.shape[0], num_experts, dtype=torch.int64, device=phy2log.device)
        logcnt.scatter_add_(1, phy2log, torch.ones_like(phy2log))
        first = (logcnt.cumsum(1) - logcnt).gather(1, phy2log.gather(1, by_expert))
        place = torch.arange(topology.num_replicas, device=phy2log.device)
        phyrank = torch.empty_like(phy2log).scatter_(1, by_expert, place - first)
        return cls(phy2log, phyrank, logcnt, topology, policy)

    @classmethod
    def spread_in_order(cls, num_layers: int, num_experts: int, topology: Topology) -> Placement:
        """The unplanned state: slot k holds expert k mod E, whatever the loads."""
        topology.check_experts(num_experts)
        slots = torch.arange(topology.num_replicas) % num_experts
        return cls.from_phy2log(slots.repeat(num_layers, 1), num_experts, topology, "in order")

    @property
    def num_layers(self) -> int:
        """L."""
        return self.phy2log.shape[0]

    @property
    def num_experts(self) -> int:
        """E, logical experts of a layer."""
        return self.logcnt.shape[1]

    @cached_property
    def log2phy(self) -> Tensor:
        """[L, E, P - E + 1], of the maps' dtype: slots of each expert in replica-rank order, padded with -1.

        Built when first asked for: it has E·(P - E + 1) entries a layer, 100 million at 94 layers of 1,024 experts
        and 2,048 replicas.
        """
        layers, slots = self.phy2log.shape
        most = self.topology.num_replicas - self.num_experts + 1
        log2phy = torch.full_like(self.phy2log[:, :1], -1).repeat(1, self.num_experts * most)
        places = torch.arange(slots, dtype=log2phy.dtype, device=log2phy.device).expand(layers, -1)
        log2phy.scatter_(1, self.phy2log.long() * most + self.phyrank, places)
        return log2phy.view(layers, self.num_experts, most)

    def gpu_loads(self, weight: Tensor) -> Tensor:
        """Load [L, D] float64 of each GPU under `weight` [L, E]; a replica carries its expert's load / count.

        Raises:
            ValueError: `weight` is not [L, E].
        """
        if tuple(weight.shape) != tuple(self.logcnt.shape):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, must be [layers, experts] = {tuple(self.logcnt.shape)}"
            )
        share = weight.detach().to(self.logcnt.device, torch.float64) / self.logcnt
        slots = share.gather(1, self.phy2log.long())
        return slots.view(self.num_layers, self.topology.num_gpus, self.topology.slots_per_gpu).sum(2)

    @overload
    def balancedness(self, weight: Tensor, *, per_layer: Literal[False] = False) -> float: ...
    @overload
    def balancedness(self, weight: Tensor, *, per_layer: Literal[True]) -> Tensor: ...

    def balancedness(self, weight: Tensor, *, per_layer: bool = False) -> float | Tensor:
        """Mean GPU load summed over layers / max GPU load summed over layers: 1 is perfect balance.

        Args:
            weight: [L, E], loads to judge the placement by.
            per_layer: return [L] float64, each layer's mean / max, instead.

        Layers without load are perfectly balanced: 1. Other programs divide otherwise; name the definition
        (`BALANCEDNESS`) wherever you print the figure.
        """
        loads = self.gpu_loads(weight)
        mean, peak = loads.mean(1), loads.amax(1)
        if per_layer:
            return torch.where(peak > 0, mean / peak, 1.0)
        return float(mean.sum() / peak.sum()) if float(peak.sum()) > 0 else 1.0

    def gap(self, weight: Tensor, *, pairing: bool = True) -> Tensor:
        """[L] float64 on the CPU: how far each layer's heaviest GPU is above the load that none can beat, relative.

        0 is provably the best there is; 0.001 is at most 0.1 % from it. A layer without load has 0.

        Args:
            weight: [L, E], loads to judge the placement by.
            pairing: as in `lower_bound`.
        """
        peak = self.gpu_loads(weight).amax(1).cpu()
        bound = lower_bound(weight, self.topology, pairing=pairing)
        return torch.where(bound > 0, peak / bound - 1, 0.0)

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the counts and maps: equal on every machine exactly if the placement is.

        Ranks that plan on their own compare it before they move weights. Brings the maps to the CPU.
        """
        topology = self.topology
        counts = (topology.num_replicas, topology.num_groups, topology.num_nodes, topology.num_gpus)
        digest = hashlib.sha256(repr(("eplb_triton placement 1", *counts, *self.logcnt.shape)).encode())
        for slots in (self.phy2log, self.phyrank):
            digest.update(slots.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def moved(self, previous: Placement) -> Moved:
        """What has to move to come from `previous` to this placement, per layer.

        Raises:
            ValueError: the two differ in layers, experts, replicas or GPUs.
        """
        for name, mine, other in (
            ("layers", self.num_layers, previous.num_layers),
            ("experts", self.num_experts, previous.num_experts),
            ("replicas", self.topology.num_replicas, previous.topology.num_replicas),
            ("GPUs", self.topology.num_gpus, previous.topology.num_gpus),
        ):
            if mine != other:
                raise ValueError(f"previous has {other} {name}, must have {mine} like this placement")
        held = self._gpu_expert_keys()
        held_before = previous._gpu_expert_keys().to(held.device)
        at = torch.searchsorted(held_before, held).clamp(max=held.shape[1] - 1)
        new = held_before.gather(1, at) != held
        new[:, 1:] &= held[:, 1:] != held[:, :-1]  # a second replica on the same GPU is fetched once
        changed = self.phy2log != previous.phy2log.to(self.phy2log.device)
        return Moved(changed.sum(1), new.sum(1))

    def duplicates(self) -> Tensor:
        """[L] int64: replicas that share their GPU with another replica of their expert."""
        held = self._gpu_expert_keys()
        again = held[:, 1:] == held[:, :-1]
        shared = torch.zeros_like(held, dtype=torch.bool)
        shared[:, 1:] |= again
        shared[:, :-1] |= again
        return shared.sum(1)

    def _gpu_expert_keys(self) -> Tensor:
        """[L, P] int64: GPU · E + expert of every slot, ascending."""
        gpus = torch.arange(self.topology.num_replicas, device=self.phy2log.device) // self.topology.slots_per_gpu
        return (gpus * self.num_experts + self.phy2log).sort(1).values

    def validate(self) -> None:
        """Check everything that is always true of a plan.

        Raises:
            ValueError: names the first layer and slot (or expert) that breaks a rule: shapes and counts; experts and
                ranks in range; every expert with at least one replica and `logcnt` of them, ranked 0 … count - 1
                each once; in hierarchical planning, groups whole on one node.
        """
        topology, layers, experts = self.topology, self.num_layers, self.num_experts
        topology.check_experts(experts)
        for name, slots in (("phy2log", self.phy2log), ("phyrank", self.phyrank)):
            if tuple(slots.shape) != (layers, topology.num_replicas):
                raise ValueError(
                    f"{name} has shape {tuple(slots.shape)}, must be "
                    f"[layers={self.logcnt.shape[0]}, num_replicas={topology.num_replicas}]"
                )
        if self.logcnt.shape[0] != layers:
            raise ValueError(f"logcnt has {self.logcnt.shape[0]} layers, must have {layers} like phy2log")
        _check_range("phy2log", self.phy2log, experts)
        held = torch.zeros_like(self.logcnt).scatter_add_(1, self.phy2log.long(), torch.ones_like(self.phy2log))
        if (bad := _first(held == 0)) is not None:
            raise ValueError(f"layer {bad[0]}: expert {bad[1]} has no replica, must have at least one")
        if (bad := _first(held != self.logcnt)) is not None:
            count, stands = int(held[bad]), int(self.logcnt[bad])
            raise ValueError(f"layer {bad[0]}: expert {bad[1]} fills {count} slots, but logcnt says {stands}")
        self._check_ranks()
        if topology.hierarchical:
            self._check_groups()

    def _check_ranks(self) -> None:
        count = self.logcnt.gather(1, self.phy2log.long())
        if (bad := _first((self.phyrank < 0) | (self.phyrank >= count))) is not None:
            raise ValueError(
                f"layer {bad[0]}, slot {bad[1]}: phyrank {int(self.phyrank[bad])} must be at least 0 and below the "
                f"{int(count[bad])} replicas of its expert {int(self.phy2log[bad])}"
            )
        key = self.phy2log.long() * self.topology.num_replicas + self.phyrank
        key, slot = key.sort(dim=1, stable=True)
        repeated = torch.zeros_like(key, dtype=torch.bool)
        repeated.scatter_(1, slot[:, 1:], key[:, 1:] == key[:, :-1])
        if (bad := _first(repeated)) is not None:
            raise ValueError(
                f"layer {bad[0]}, slot {bad[1]}: replica {int(self.phyrank[bad])} of expert {int(self.phy2log[bad])} "
                "is in an earlier slot too, must be in one"
            )

    def _check_groups(self) -> None:
        topology = self.topology
        group = self.phy2log.long() // (self.num_experts // topology.num_groups)
        slots = torch.arange(topology.num_replicas, device=group.device)
        node = (slots // topology.replicas_per_node).expand_as(group)
        home = torch.full((self.num_layers, topology.num_groups), topology.num_nodes, device=group.device)
        home.scatter_reduce_(1, group, node, "amin")
        if (bad := _first(node != home.gather(1, group))) is not None:
            raise ValueError(
                f"layer {bad[0]}, slot {bad[1]}: expert {int(self.phy2log[bad])} of group {int(group[bad])} is on node "
                f"{int(node[bad])}, but the group is on node {int(home[bad[0], group[bad]])}; must stay on one"
            )


def _first(broken: Tensor) -> tuple[int, ...] | None:
    """Index of the first True of `broken`, or None."""
    where = broken.nonzero()
    return tuple(where[0].tolist()) if len(where) else None


def _check_range(name: str, slots: Tensor, num_experts: int) -> None:
    if (bad := _first((slots < 0) | (slots >= num_experts))) is not None:
        raise ValueError(
            f"layer {bad[0]}, slot {bad[1]}: {name} names expert {int(slots[bad])}, must be 0 to {num_experts - 1}"
        )
