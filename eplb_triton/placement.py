"""Placement: which expert sits in which physical slot, and what one asks of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from eplb_triton import judging, slot_maps
from eplb_triton.buffers import check_buffers, copy_maps, new_buffers
from eplb_triton.placement_rules import check_alike, check_commit, check_placement, check_slot_map, refuse_bad
from eplb_triton.replans import Changes, deployment_order
from eplb_triton.serving import dispatch
from eplb_triton.serving.transfers import Transfers, list_transfers
from eplb_triton.slot_maps import Moved
from eplb_triton.topology import Topology


@dataclass(eq=False)
class Placement:
    """The maps of a plan, in tensors of its own: a planner fills them again and again, and all that is asked of a
    placement is worked out from what they hold then. The constructor checks nothing; `validate` checks everything.

    Args:
        phy2log: [L, P] int64 (or int32, as all maps), expert in each physical slot; slot k is on GPU k // S, S = P / D.
            -1: the slot holds none, in what comes from `from_phy2log` alone.
        phyrank: [L, P], which of its expert's replicas each slot holds, counted from 0.
        logcnt: [L, E], replicas of each expert.
        topology: the counts it was planned for.
        policy: name of the policy that planned it last.
        log2phy: [L, E, width], slots of each expert by replica rank, padded with -1; None where nobody asked for it.
        bad: [L, N] int32, status of each row: -1 (`GOOD`); the lowest expert whose load was bad and counted as 0;
            -2 (`NO_ROOM`), where an expert has more replicas than log2phy has room for. `raise_if_bad` reads it.
        classes: [L, E] int32, which experts `split` levels side by side: -1 for one place or none; experts of one class
            share no GPU. Written by whatever writes the maps.
        changes: what replanning wrote and expects of it, per layer; None where the policy does not replan.
        partial: whether `from_phy2log` found slots that hold no expert, or experts that no slot holds.
    """

    phy2log: Tensor
    phyrank: Tensor
    logcnt: Tensor
    topology: Topology
    policy: str
    log2phy: Tensor | None = None
    bad: Tensor | None = None
    classes: Tensor | None = None
    changes: Changes | None = None
    partial: bool = False

    @classmethod
    def empty(
        cls,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.int64,
        log2phy: bool | int = False,
    ) -> Placement:
        """A placement that holds nothing yet, in new tensors, for a planner to fill.

        Args:
            dtype: of the maps, torch.int64 or torch.int32.
            log2phy: True for log2phy of width P - E + 1, which has room for any plan, or a width.

        Raises:
            ValueError: E does not fit the topology; a count, the dtype or the width is none of those named.
        """
        shapes = topology.map_shapes(num_layers, num_experts, log2phy=log2phy)
        new = new_buffers(shapes, dtype, torch.device(device))
        maps = new["phy2log"], new["phyrank"], new["logcnt"]
        return cls(*maps, topology, "empty", new.get("log2phy"), new["bad"], new["classes"])

    @classmethod
    def over(
        cls,
        topology: Topology,
        *,
        phy2log: Tensor,
        logcnt: Tensor,
        phyrank: Tensor | None = None,
        log2phy: Tensor | None = None,
        policy: str = "custom",
    ) -> Placement:
        """A placement over the tensors of an engine: a planner fills them in place, `refresh` follows their slot map.

        Args:
            phy2log: [L, P] int64 or int32, contiguous, at an address that 16 divides: as phyrank and logcnt.
            logcnt: [L, E], as phy2log; E is taken from it.
            phyrank: [L, P], as phy2log; None: a new tensor.
            log2phy: [L, E, width] of any width, entries of an expert side by side, experts and layers anywhere.
            policy: what the placement is called until a planner fills it.

        Raises:
            TypeError, ValueError: names the tensor, what it is and what it must be.
        """
        layers, experts = check_buffers(topology, phy2log, logcnt, phyrank, log2phy)
        shapes = topology.map_shapes(layers, experts, log2phy=False)
        new = new_buffers(shapes, phy2log.dtype, phy2log.device)
        if phyrank is None:
            phyrank = new["phyrank"]
        return cls(phy2log, phyrank, logcnt, topology, policy, log2phy, new["bad"], new["classes"])

    @classmethod
    def from_phy2log(
        cls,
        phy2log: Tensor,
        num_experts: int,
        topology: Topology,
        policy: str = "custom",
        *,
        log2phy: bool | int = False,
    ) -> Placement:
        """A placement from the slot map alone; replicas of an expert are ranked in slot order.

        Args:
            phy2log: [L, P] integer, experts 0 … E - 1. A slot of -1 holds none: a GPU that has just joined. Such a
                placement is a `previous`; what needs every expert refuses it.
            log2phy: as in `empty`.

        Raises:
            TypeError: `phy2log` is no dense tensor of integers.
            ValueError: `phy2log` is not [L, P], or names an expert outside -1 … E - 1.
        """
        check_slot_map(phy2log, num_experts, topology)
        made = cls.empty(topology, len(phy2log), num_experts, device=phy2log.device, log2phy=log2phy)
        made.policy = policy
        made.phy2log.copy_(phy2log)
        made.refresh()
        made.partial = bool((made.phy2log < 0).any()) or bool((made.logcnt == 0).any())
        return made

    @classmethod
    def spread_in_order(cls, num_layers: int, num_experts: int, topology: Topology) -> Placement:
        """The unplanned state: slot k holds expert k mod E, whatever the loads."""
        topology.check_experts(num_experts)
        slots = torch.arange(topology.num_replicas, dtype=torch.int64, device="cpu") % num_experts
        return cls.from_phy2log(slots.repeat(num_layers, 1), num_experts, topology, "in order")

    @property
    def num_layers(self) -> int:
        """L."""
        return self.phy2log.shape[0]

    @property
    def num_experts(self) -> int:
        """E, logical experts of a layer."""
        return self.logcnt.shape[1]

    def refresh(self) -> None:
        """Work out all else anew from phy2log, after somebody else wrote that; ranks in slot order. Nothing waits."""
        slot_maps.refresh(self)
        if self.classes is not None:
            dispatch.classify(self.phy2log, self.num_experts, self.topology, out=self.classes)

    def refresh_log2phy(self) -> None:
        """Work out log2phy anew, where there is one, from phy2log and phyrank. Nothing waits."""
        slot_maps.refresh_log2phy(self)

    def slots_of_experts(self, width: int | None = None) -> Tensor:
        """A new log2phy [L, E, width]: slots of each expert in replica-rank order, padded with -1.

        Args:
            width: replicas that there is room for, those ranked behind are left out; None: P - E + 1, room for any
                plan. That is E·(P - E + 1) entries a layer, 100 million at 94 layers of 1,024 experts, 2,048 replicas.
        """
        width = self.topology.num_replicas - self.num_experts + 1 if width is None else width
        return slot_maps.slots_of_experts(self.phy2log, self.phyrank, self.num_experts, width)

    def copy_(self, other: Placement) -> Placement:
        """Take over what `other` holds, in stream order: the commit of a plan. Nothing waits, nothing is shared.

        Raises:
            ValueError: the two differ in topology, layers or experts, or this one has a log2phy that cannot hold the
                other's.
        """
        check_commit(self, other)
        copy_maps(self, other)
        self.policy, self.partial = other.policy, other.partial
        return self

    def raise_if_bad(self) -> None:
        """Refuse a plan that did not come out as asked. Waits for the GPU.

        Raises:
            ValueError: names the first layer, and the expert whose load was NaN, negative or above 2**100 (it counted
                as 0), or that has more replicas than log2phy has room for.
        """
        refuse_bad(self)

    def deployment_order(self) -> Tensor:
        """[L] int64 on the device: the layers worth deploying, largest predicted gain first, then -1; see
        `replans.deployment_order`. ValueError where nothing is predicted, as the policy does not replan."""
        if self.changes is None:
            raise ValueError(f"a placement of policy={self.policy!r} has no predictions, one of 'steady' has")
        return deployment_order(self.changes)

    def split(
        self,
        counts: Tensor,
        rounds: int = 8,
        backend: str = "auto",
        out: Tensor | None = None,
        *,
        rank: int | None = None,
        offsets: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """Quotas [L, P] int32: how many of its expert's `counts` a slot gets; see `serving.dispatch.split`."""
        classes = self.classes
        if classes is None:
            classes = dispatch.classify(self.phy2log, self.num_experts, self.topology, backend=backend)
        return dispatch.split(
            counts, self.phy2log, classes, self.topology,
            rounds=rounds, rank=rank, backend=backend, out=out, offsets=offsets, workspace=workspace,
        )  # fmt: skip

    def slots_of(
        self, topk_ids: Tensor, layer: int, quotas: Tensor, offsets: Tensor | None = None, salt: int | Tensor = 0
    ) -> Tensor:
        """The physical slot [tokens, k] of each token of a layer, by `quotas`; see `serving.dispatch.slots_of`."""
        sizes = self.num_experts, self.topology
        return dispatch.slots_of(topk_ids, layer, quotas, self.phy2log, *sizes, offsets=offsets, salt=salt)

    def table(self, quotas: Tensor, width: int, out: Tensor | None = None) -> Tensor:
        """A log2phy [L, E, width] whose entries repeat in proportion to `quotas`; see `serving.dispatch.table`."""
        return dispatch.table(quotas, width, self.phy2log, self.num_experts, self.topology, out=out)

    def dispatch_map(self, rank: int) -> Tensor:
        """The one slot [L, E] that a rank sends each expert's tokens to; see `serving.dispatch.dispatch_map`."""
        return dispatch.dispatch_map(rank, self.phy2log, self.num_experts, self.topology)

    def gpu_loads(self, loads: Tensor) -> Tensor:
        """Load [L, D] float64 of each GPU under `loads` [L, E]; a replica carries its expert's load / count.

        Raises:
            ValueError: `loads` is not [L, E], or holds, on the CPU, one that is NaN, negative or above 2**100 (on a GPU
                what follows from a NaN is NaN); an expert has no replica.
        """
        return judging.gpu_loads(self, loads)

    @overload
    def balancedness(self, loads: Tensor, *, per_layer: Literal[False] = False) -> float: ...
    @overload
    def balancedness(self, loads: Tensor, *, per_layer: Literal[True]) -> Tensor: ...
    def balancedness(self, loads: Tensor, *, per_layer: bool = False) -> float | Tensor:
        """Mean GPU load summed over layers / max GPU load summed over layers: 1 is perfect balance.

        Args:
            loads: [L, E], what to judge the placement by.
            per_layer: return [L] float64, each layer's mean / max, instead.

        Layers without load have 1. Other programs divide otherwise; name the definition wherever you print the figure.
        """
        return judging.balancedness(self, loads, per_layer=per_layer)

    def gap(self, loads: Tensor, *, pairing: bool = True) -> Tensor:
        """[L] float64 on the CPU: how far each layer's heaviest GPU is above the load that none can beat, relative.

        0 is provably the best there is; 0.001 is at most 0.1 % from it. A layer without load has 0. `pairing` as in
        `lower_bound`.
        """
        return judging.gap(self, loads, pairing=pairing)

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the counts and maps: equal on every machine exactly if the placement is.

        Ranks that plan on their own compare it before they move weights. Brings the maps to the CPU.
        """
        return slot_maps.fingerprint_of(self)

    def moved(self, previous: Placement) -> Moved:
        """What has to move to come from `previous` to this placement, per layer. ValueError where the two differ in
        layers, experts, replicas or GPUs."""
        return slot_maps.moved(self, previous)

    def transfers(self, live: Placement, out: Transfers | None = None) -> Transfers:
        """From where each slot is filled when this placement follows `live`, and in which batch; see
        `serving.transfers.list_transfers`. On a GPU nothing waits, and with `out` nothing is allocated."""
        check_alike(self, live)
        return list_transfers(self.phy2log, live.phy2log, self.num_experts, self.topology, out=out)

    def duplicates(self) -> Tensor:
        """[L] int64: replicas that share their GPU with another replica of their expert."""
        return slot_maps.doubled_replicas(self)

    def validate(self) -> None:
        """Check everything that is always true of a plan. Waits for the GPU.

        Raises:
            TypeError: a map is no dense tensor of integers.
            ValueError: names the first layer and slot (or expert) that breaks a rule: shapes and counts; experts and
                ranks in range; every expert with at least one replica and `logcnt` of them, ranked 0 … count - 1
                each once; in hierarchical planning, groups whole on one node.
        """
        check_placement(self)
