"""Planner, and plan and rebalance_experts, which use one once: checks -> policy -> one backend -> Placement."""

from __future__ import annotations

from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor

from eplb_triton.backends import resolve_backend
from eplb_triton.binding import Job, Relabel, bind, bind_classify, bind_relabel, bind_replan
from eplb_triton.buffers import check_map_dtype
from eplb_triton.fitting import check_loads, check_moves, check_out, check_price, slots_before
from eplb_triton.loads import as_loads, check_shape
from eplb_triton.placement import Placement
from eplb_triton.placement_rules import refuse_bad
from eplb_triton.policy import DEFAULT_POLICY, DEFAULT_REPLAN_POLICY, Policy, resolve_policy
from eplb_triton.replans import DEFAULT_PRICE, Changes
from eplb_triton.topology import Topology


class Planner:
    """Plans of one shape by one policy: all that can be checked, compiled or allocated is, here, and never later.

    `planner(loads, out=placement)` on a GPU runs on the current stream: it neither waits nor allocates nor compiles,
    from the first call on, in a CUDA graph too. One stream at a time may use a planner on a GPU, whose scratch it owns;
    on the CPU any number of threads may, each with a placement of its own to fill.

    Args:
        topology: replicas, GPUs, groups and nodes.
        num_layers: L.
        num_experts: E.
        policy: a name of `POLICIES`, `balanced_low` or `balanced_high` (`EFFORTS`), or a Policy.
        device: where loads come from and placements are.
        backend: `triton` plans on the GPU that holds the loads; `cpu` is compiled by Numba, `reference` is plain
            PyTorch on the CPU: both copy loads from another device and the maps back. `auto` is `triton` for a GPU,
            else `cpu` where Numba can be imported, else `reference`.
        loads_dtype: of the loads on a GPU, real or integer; on the CPU loads may have any.
        dtype: of the maps, torch.int64 or torch.int32.
        log2phy: whether new placements have a log2phy: True for width P - E + 1, which is enough for any plan, or a
            width.
        steps: most steps of a history, on a GPU; on the CPU it may have any number.

    Raises:
        TypeError: a count is no integer.
        ValueError: a count, dtype or name is none of those that the message lists; E does not fit the topology; the
            backend cannot take the shape or the device.
        ImportError: the backend asked for needs a package that cannot be imported.
    """

    _renumbers = True  # the plan of a policy that does not replan, for a placement in force

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_experts: int,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        loads_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.int64,
        log2phy: bool | int = False,
        steps: int = 1,
    ) -> None:
        if not isinstance(topology, Topology):
            raise TypeError(f"topology is a {type(topology).__name__}, must be an eplb_triton.Topology")
        check_map_dtype(dtype)
        self.topology = topology
        self.policy = resolve_policy(policy)
        self.device = torch.empty(0, device=device).device  # cuda becomes cuda:0
        self.backend = resolve_backend(backend, self.device)
        self._shapes = topology.map_shapes(num_layers, num_experts, log2phy=log2phy)
        self._job = Job(topology, num_layers, num_experts, self.policy, self.device, loads_dtype, dtype, log2phy, steps)
        self._fill = None if self.policy.replan else bind(self.backend, self._job)
        self._replan = bind_replan(self.backend, self._job) if self.policy.replan else None
        renumbers = self._renumbers and not self.policy.replan
        self._relabel: Relabel | None = bind_relabel(self.backend, self._job) if renumbers else None
        self._classify = bind_classify(self.backend, self._job)
        self._checked: WeakSet[Placement] = WeakSet()

    def empty(self) -> Placement:
        """A placement for this planner to fill, in new tensors: the only thing here that allocates."""
        job = self._job
        made = Placement.empty(
            job.topology, job.num_layers, job.num_experts, device=job.device, dtype=job.dtype, log2phy=job.log2phy
        )
        if self.policy.replan:
            made.changes = Changes.empty(job.num_layers, self.device)
        self._checked.add(made)
        return made

    def over(
        self, *, phy2log: Tensor, logcnt: Tensor, phyrank: Tensor | None = None, log2phy: Tensor | None = None
    ) -> Placement:
        """A placement over an engine's tensors, for this planner to fill in place; see `Placement.over`.

        Raises:
            TypeError, ValueError: as `Placement.over`; or the tensors do not fit this planner.
        """
        made = Placement.over(self.topology, phy2log=phy2log, logcnt=logcnt, phyrank=phyrank, log2phy=log2phy)
        if self.policy.replan:
            made.changes = Changes.empty(made.num_layers, self.device)
        self._accept(made)
        return made

    def _accept(self, out: Placement) -> None:
        """Refuse what this planner cannot fill; what passes once is not looked at again."""
        check_out(self._job, self._shapes, out)
        self._checked.add(out)

    def __call__(
        self,
        loads: Tensor,
        *,
        out: Placement | None = None,
        previous: Placement | None = None,
        price: float | None = None,
        moves: int | None = None,
    ) -> Placement:
        """Plan every layer for `loads` into `out`.

        Args:
            loads: [L, E], load of each logical expert, in tokens or any unit, or a history [n, L, E], oldest step
                first; any strides, on the device of this planner and, there, of its `loads_dtype`. Each is rounded
                once to float32. A policy that replans judges by the steps; any other plans for their sum.
            out: a placement to fill, from `empty` or `over`; None allocates a new one.
            previous: the placement in force, of the same counts; slots of -1 are filled, in global planning. A policy
                that replans moves away from it what pays. The plan of any other is renumbered, nodes, then GPUs, then
                slots, so that experts stay where they can. None: nothing is in force.
            price: for a policy that replans from `previous`: what one written slot must save, as a share of the mean
                GPU load, `replan_price` computes it; None is 3e-4.
            moves: for such a policy: slots that a layer may write at most; None: no limit.

        Returns:
            `out`, a valid placement, the same bits on every backend, device and machine. Ties anywhere go to the
            lowest index. On a GPU a load that is NaN, negative or above 2**100 counts as 0 and `out.bad` says so (where
            steps are added up, with the expert's loads of all steps), and
            a layer whose `previous` cannot be planned on stays as it is and `out.changes.status` says so.

        Raises:
            TypeError: `loads` is no tensor, or `out` or `previous` no Placement.
            ValueError: an argument does not fit this planner; `previous` and `out` share memory; on the CPU, a load is
                NaN, negative or above 2**100, or `previous` lacks experts that it has no room for or splits groups
                (then `out` is as it was).
        """
        check_loads(self._job, self.backend, loads)
        if out is None:
            out = self.empty()
        elif out not in self._checked:
            self._accept(out)
        before = None if previous is None else slots_before(self._job, previous, out)
        if self._replan is not None:
            price = DEFAULT_PRICE if price is None else check_price(price)
            history = loads if loads.dim() == 3 else loads.unsqueeze(0)
            self._replan(history, out, before, price, None if moves is None else check_moves(moves))
        else:
            if price is not None or moves is not None:
                raise ValueError(
                    f"price={price}, moves={moves} must be None for policy={self.policy.name!r}, which does not "
                    "replan; 'steady' does"
                )
            assert self._fill is not None
            self._fill(loads, out)
            if before is not None:
                assert self._relabel is not None
                self._relabel(before, out)
            self._classify(out)
        out.policy, out.partial = self.policy.name, False
        return out


class _FirstPlanner(Planner):
    """For calls without a placement in force: without the kernel that renumbers, which takes seconds to compile."""

    _renumbers = False


def plan(
    loads: Tensor,
    topology: Topology,
    policy: str | Policy | None = None,
    *,
    previous: Placement | None = None,
    price: float | None = None,
    moves: int | None = None,
    backend: str = "auto",
    dtype: torch.dtype = torch.int64,
    check: Literal["async", "sync"] = "async",
    log2phy: bool | int = False,
    out: Placement | None = None,
) -> Placement:
    """Plan once: how many replicas each expert gets and which GPU holds which.

    A loop makes a `Planner` once and calls that: it has nothing left to compile or to allocate.

    Args:
        loads: [L, E], load of each logical expert, in tokens or any unit, or a history [n, L, E], oldest step first;
            any real or integer dtype, any strides. Each element is rounded once to float32.
        topology: replicas, GPUs, groups and nodes.
        policy: a name of `POLICIES`, `balanced_low` or `balanced_high` (`EFFORTS`), or a Policy; None is `steady` where
            `previous` is given, else `balanced`.
        previous: the placement in force; as price and moves, see `Planner.__call__`.
        price: what one written slot must save.
        moves: slots that a layer may write at most.
        backend: as in `Planner`.
        dtype: of the maps, torch.int64 or torch.int32; with `out`, that of its maps counts.
        check: what becomes of bad loads on `triton`: `async` counts each as 0 and records it in `Placement.bad`,
            `sync` waits for the GPU and raises. The other backends always raise.
        log2phy: whether the placement has a log2phy, as in `Planner`; with `out`, whether that has one counts.
        out: a placement to fill, in place of a new one.

    Returns:
        A valid Placement on the device of `loads`, the same bits on every backend, device and machine. Ties anywhere
        go to the lowest index.

    Raises:
        TypeError: `loads` is no tensor, `topology` no Topology, `out` no Placement.
        ValueError: `loads` is not 2-D, is complex or boolean, has no experts, or holds a load that is NaN, negative or
            above 2**100 (see `check`); the topology does not fit it; the policy or backend is unknown, or the backend
            cannot take the shape, the device, or an argument.
        ImportError: the backend asked for needs a package that cannot be imported.
    """
    check_shape(loads, name="loads", history=isinstance(loads, Tensor) and loads.dim() == 3)
    if check not in ("async", "sync"):
        raise ValueError(f"check={check!r} must be 'async' or 'sync'")
    if out is not None and isinstance(out, Placement):
        dtype, log2phy = out.phy2log.dtype, False if out.log2phy is None else out.log2phy.shape[2]
    if not isinstance(topology, Topology):
        raise TypeError(f"topology is a {type(topology).__name__}, must be an eplb_triton.Topology")
    if loads.dtype in _NOT_LOADED:
        loads = loads.to(torch.float32)
    if policy is None:
        policy = DEFAULT_POLICY if previous is None else DEFAULT_REPLAN_POLICY
    kind = _FirstPlanner if previous is None else Planner
    placement = kind(
        topology,
        *loads.shape[-2:],
        policy=policy,
        device=loads.device,
        backend=backend,
        loads_dtype=loads.dtype,
        dtype=dtype,
        log2phy=log2phy,
        steps=len(loads) if loads.dim() == 3 else 1,
    )(loads, out=out, previous=previous, price=price, moves=moves)
    if check == "sync":
        refuse_bad(placement, loads)
    return placement


_NOT_LOADED = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of loads that no kernel reads: rounded to float32 before."""


def rebalance_experts(
    weight: Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: str | Policy = "deepseek",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's EPLB entry point, same arguments, same results: unlike `plan`, it uses DeepSeek's policy by default.

    Args:
        weight: [L, E], load of each logical expert.
        num_replicas: P, physical experts a layer, a multiple of `num_gpus`.
        num_groups: G, expert groups a layer.
        num_nodes: N, nodes.
        num_gpus: D, GPUs over all nodes.
        policy: see `plan`.
        backend: see `plan`.

    Returns:
        phy2log [L, P], log2phy [L, E, P - E + 1] (padded with -1), logcnt [L, E], int64, on the device of `weight`.

    Raises:
        TypeError, ValueError: as `Topology` and `plan`.

    Source: https://github.com/deepseek-ai/EPLB
    """
    topology = Topology(num_replicas=num_replicas, num_gpus=num_gpus, num_groups=num_groups, num_nodes=num_nodes)
    check_shape(weight)
    loads = as_loads(weight) if weight.device.type == "cpu" else weight  # errors with this one's word
    placement = plan(loads, topology, policy, backend=backend, log2phy=True)
    assert placement.log2phy is not None
    return placement.phy2log, placement.log2phy, placement.logcnt
