"""Replanning: from the placement in force to one for the loads to come, writing only slots that pay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from eplb_triton.cpu.arith import Doubles, Floats, Ints, double_rows, ints
from eplb_triton.cpu.compiled import entry_point, stage
from eplb_triton.cpu.launcher import _in_spans
from eplb_triton.cpu.relabelling import relabel_gpus
from eplb_triton.cpu.replanning_fresh import fresh_plan
from eplb_triton.cpu.replanning_history import sample_history
from eplb_triton.cpu.replanning_moves import improve
from eplb_triton.cpu.replanning_potential import (
    Rule,
    State,
    new_state,
    potential_of,
    predicted_peak,
    price_of_slot,
    state_of,
)
from eplb_triton.cpu.replanning_previous import fill_slots, previous_status
from eplb_triton.cpu.replanning_room import Room, new_room
from eplb_triton.partitions import partitions_to_try
from eplb_triton.policy import Policy
from eplb_triton.replan_status import FINE
from eplb_triton.replans import Replanned, score_z
from eplb_triton.topology import Topology

NO_LIMIT = np.int64(1 << 62)
SPANS_PER_THREAD = 4  # one layer may move ten times as often as another: 58 layers in 8 spans; each allocates 0.4 MB


def replan_layers(
    history: torch.Tensor,
    topology: Topology,
    policy: Policy,
    previous: torch.Tensor | None,
    price: float,
    moves: int | None,
    *,
    num_threads: int | None = None,
) -> Replanned:
    """Plan every layer for the loads to come with compiled code; the bits do not depend on the number of threads.

    Args:
        history: [n, L, E] float32 on the CPU, loads of n >= 1 steps, oldest first: finite, at least 0, no -0.
        topology: counts of the cluster.
        policy: one with `replan`.
        previous: [L, P] int64, the placement in force; -1: no expert there. None: nothing is in force.
        price: what a written slot must save, a part of the mean GPU load: finite, at least 0.
        moves: a layer writes at most so many slots, fills apart; None: no limit.
        num_threads: threads to use at most, the caller's among them; None is torch.get_num_threads().

    Returns:
        See Replanned. A layer whose `previous` cannot be planned on stays as it is, with a status.

    Raises:
        ValueError: `policy` does not replan; `num_threads` is below 1.

    Ties: see the stages.
    """
    rule = policy.replan
    if rule is None:
        raise ValueError(f"policy={policy.name!r} does not replan; one with `replan`, like 'steady', does")
    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1; None is torch.get_num_threads()")
    num_layers, num_replicas = history.shape[1], topology.num_replicas
    loads = history.detach().contiguous().numpy()
    before = np.empty((0, num_replicas), np.int64) if previous is None else previous.contiguous().numpy()
    table = partitions_to_try(topology.planned_groups, topology.planned_nodes)
    partitions = np.array(table, np.int64).reshape(len(table), topology.planned_groups)
    phy2log = np.empty((num_layers, num_replicas), np.int64)
    counts, peaks = np.empty((3, num_layers), np.int64), np.empty((2, num_layers), np.float64)
    sizes = topology.planned_groups, topology.planned_nodes, topology.num_gpus
    limits = np.array([rule.samples, rule.norm, rule.moves, rule.fresh_moves], np.int64)
    most_slots = NO_LIMIT if moves is None else moves
    asked = score_z(topology.num_gpus, rule.z), float(price), most_slots
    rows = compiled_replan()

    def replan(first: int, last: int) -> None:
        rows(loads, before, partitions, *sizes, limits, *asked, phy2log, counts, peaks, first, last)

    _in_spans(replan, num_layers, max(1, min(num_threads, num_layers)), SPANS_PER_THREAD)
    written, fills, status = torch.from_numpy(counts).unbind()
    peak_before, peak_after = torch.from_numpy(peaks).unbind()
    return Replanned(torch.from_numpy(phy2log), written, fills, peak_before, peak_after, status.to(torch.int32))


@cache
def compiled_replan() -> Callable[..., None]:
    """The entry point that replans layers."""

    def replan_rows(
        history: Floats,  # [n, L, E]
        previous: Ints,  # [L, P], or [0, P]: nothing is in force
        table: Ints,  # [partitions, G], or empty: see pack_partition
        num_groups: int,
        num_nodes: int,
        num_gpus: int,
        limits: Ints,  # samples, norm, moves, fresh moves
        z: float,
        price: float,
        most_slots: int,
        phy2log: Ints,  # [L, P], filled
        counts: Ints,  # [3, L], filled: slots written, fills, status
        peaks: Doubles,  # [2, L], filled: before and after
        first: int,  # layers first .. last-1
        last: int,
    ) -> None:
        num_experts, num_replicas = history.shape[2], phy2log.shape[1]
        d, s = num_gpus // num_nodes, num_replicas // num_gpus
        state = new_state(num_experts, num_replicas, num_gpus, num_nodes, limits[0])
        room = new_room(num_experts, s, d, state.samples.shape[1])
        samples = double_rows(limits[0], num_experts)
        before = ints(num_replicas if previous.shape[0] > 0 else 0)
        for layer in range(first, last):
            counts[:, layer], peaks[:, layer] = 0, np.nan
            if before.size > 0:
                counts[2, layer] = previous_status(previous[layer], num_experts, num_groups, num_nodes)
                phy2log[layer] = previous[layer]
                if counts[2, layer] != FINE:
                    continue
            num_samples = sample_history(history, layer, limits[0], samples)
            state.samples[:] = 0
            for expert in range(num_experts):
                for t in range(num_samples):
                    state.samples[expert, t] = samples[t, expert]
            rule = Rule(num_samples, z, limits[1], d, s)
            if before.size == 0:
                counts[0, layer] = num_replicas
                peak = _fresh(state, rule, before, num_groups, table, limits[3], room)
            else:
                state.phy2log[:] = previous[layer]
                counts[1, layer] = fill_slots(state, s)
                before[:] = state.phy2log
                state_of(state, rule)
                peaks[0, layer] = predicted_peak(potential_of(state, rule).peak, num_samples, num_gpus)
                of_slot = price_of_slot(price, num_samples, num_gpus)
                peak = _replan(state, rule, before, of_slot, most_slots, num_groups, table, limits, room)
                counts[0, layer] = _differing(state.phy2log, before)
            peaks[1, layer] = predicted_peak(peak, num_samples, num_gpus)
            phy2log[layer] = state.phy2log

    signature = (
        "void(float32[:, :, ::1], int64[:, ::1], int64[:, ::1], int64, int64, int64, int64[::1], float64, float64, "
        "int64, int64[:, ::1], int64[:, ::1], float64[:, ::1], int64, int64)"
    )
    return entry_point(replan_rows, signature, "all", "policies that replan, about 25 s")


@stage
def _replan(
    state: State,
    rule: Rule,
    before: Ints,
    price: float,
    most_slots: int,
    num_groups: int,
    table: Ints,
    limits: Ints,
    room: Room,
) -> float:
    """Moves that pay; where they were as many as there may be, a fresh plan if that is worth the slots it writes; J."""
    made, peak = improve(state, rule, price, most_slots, limits[2], True, room)
    if made < limits[2]:
        return peak
    moved = state.phy2log.copy()
    fresh_peak = _fresh(state, rule, before, num_groups, table, limits[3], room)
    num_nodes = state.score.size // rule.num_gpus
    relabel_gpus(before, state.phy2log, num_nodes, rule.num_gpus, state.counts.size)
    written = _differing(state.phy2log, before)
    cost = fresh_peak + price * np.float64(written)
    if written <= most_slots and cost < peak + price * np.float64(_differing(moved, before)):
        return fresh_peak
    state.phy2log[:] = moved
    return peak


@stage
def _fresh(
    state: State, rule: Rule, previous: Ints, num_groups: int, table: Ints, most_moves: int, room: Room
) -> float:
    """A fresh plan, improved by swaps at no price; J."""
    fresh_plan(state, rule, previous, num_groups, table)
    state_of(state, rule)
    _, peak = improve(state, rule, 0.0, NO_LIMIT, most_moves, False, room)
    return peak


@stage
def _differing(a: Ints, b: Ints) -> int:
    """How many slots differ."""
    n = 0
    for slot in range(a.size):
        n += 1 if a[slot] != b[slot] else 0
    return n
