"""Replanning: from the placement in force to one for the loads to come, writing only slots that pay."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.relabelling import relabel_gpus
from eplb_reference.replanning_fresh import fresh_plan
from eplb_reference.replanning_history import sample_history
from eplb_reference.replanning_moves import Improved, improve
from eplb_reference.replanning_potential import Judge, predicted_peak, price_of_slot, state_of
from eplb_reference.replanning_previous import fill_slots, previous_status
from eplb_triton.policy import Policy, Replan
from eplb_triton.replan_status import FINE
from eplb_triton.replans import Replanned, score_z
from eplb_triton.topology import Topology

NO_LIMIT = 1 << 62


def replan_layers(
    history: Tensor,
    topology: Topology,
    policy: Policy,
    previous: Tensor | None,
    price: float,
    moves: int | None,
) -> Replanned:
    """Plan every layer for the loads to come, all layers at once.

    Args:
        history: [n, L, E] float32 on the CPU, loads of n >= 1 steps, oldest first: finite, at least 0, no -0.
        topology: counts of the cluster.
        policy: one with `replan`.
        previous: [L, P] int64, the placement in force; -1: no expert there. None: nothing is in force.
        price: what a written slot must save, a part of the mean GPU load: finite, at least 0.
        moves: a layer writes at most so many slots, fills apart; None: no limit.

    Returns:
        See Replanned. A layer whose `previous` cannot be planned on stays as it is, with a status.

    Raises:
        ValueError: `policy` does not replan.

    Ties: see the stages.
    """
    rule = policy.replan
    if rule is None:
        raise ValueError(f"policy={policy.name!r} does not replan; one with `replan`, like 'steady', does")
    judge = Judge(*sample_history(history, rule.samples), score_z(topology.num_gpus, rule.z), rule.norm)
    if previous is None:
        plan = _fresh(judge, topology, rule, None)
        num_layers = history.shape[1]
        return Replanned(
            plan.phy2log,
            torch.full((num_layers,), topology.num_replicas, dtype=torch.int64, device="cpu"),
            torch.zeros(num_layers, dtype=torch.int64, device="cpu"),
            torch.full((num_layers,), torch.nan, dtype=torch.float64, device="cpu"),
            predicted_peak(plan.peak, judge.num_samples, topology.num_gpus),
            torch.full((num_layers,), FINE, dtype=torch.int32, device="cpu"),
        )
    status = previous_status(previous, history.shape[2], topology)
    fine = status == FINE
    judge, kept = judge.of(fine), previous[fine]
    before = fill_slots(kept, judge.samples.sum(2), topology.num_gpus)
    peak = state_of(before, judge, topology).potential.peak
    plan = _replan(before, judge, topology, rule, price, NO_LIMIT if moves is None else moves)
    phy2log = previous.clone()
    phy2log[fine] = plan.phy2log

    def of_all(values: Tensor, missing: float) -> Tensor:
        found = torch.full(fine.shape, missing, dtype=values.dtype, device="cpu")
        found[fine] = values
        return found

    return Replanned(
        phy2log,
        of_all((plan.phy2log != before).sum(1), 0),
        of_all((kept < 0).sum(1), 0),
        of_all(predicted_peak(peak, judge.num_samples, topology.num_gpus), torch.nan),
        of_all(predicted_peak(plan.peak, judge.num_samples, topology.num_gpus), torch.nan),
        status,
    )


def _replan(before: Tensor, judge: Judge, topology: Topology, rule: Replan, price: float, moves: int) -> Improved:
    """Moves that pay; where they were as many as there may be, a fresh plan if that is worth the slots it writes."""
    of_slot = price_of_slot(price, judge.num_samples, topology.num_gpus)
    plan = improve(before, judge, topology, of_slot, moves, rule.moves, change_counts=True)
    again = plan.num_moves == rule.moves
    if not bool(again.any()):
        return plan
    was, moved, of_slot = before[again], plan.phy2log[again], of_slot[again]
    fresh = _fresh(judge.of(again), topology, rule, was)
    renamed = relabel_gpus(was, fresh.phy2log, topology)
    written, written_by_moves = (renamed != was).sum(1), (moved != was).sum(1)
    cost = fresh.peak + of_slot * written.to(torch.float64)
    cost_of_moves = plan.peak[again] + of_slot * written_by_moves.to(torch.float64)
    taken = (written <= moves) & (cost < cost_of_moves)
    plan.phy2log[again] = torch.where(taken.unsqueeze(1), renamed, moved)
    plan.peak[again] = torch.where(taken, fresh.peak, plan.peak[again])
    return plan


def _fresh(judge: Judge, topology: Topology, rule: Replan, previous: Tensor | None) -> Improved:
    """A fresh plan, improved by swaps at no price."""
    start = fresh_plan(judge, topology, previous)
    free = torch.zeros(len(start), dtype=torch.float64, device="cpu")
    return improve(start, judge, topology, free, NO_LIMIT, rule.fresh_moves, change_counts=False)
