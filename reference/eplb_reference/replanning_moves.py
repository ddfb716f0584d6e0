"""Replanning: from a placement to a better one, by the move that gains most a written slot, again and again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eplb_reference.replanning_potential import (
    Judge,
    State,
    least_gain,
    powers,
    scores,
    state_of,
)
from eplb_reference.replanning_replicas import best_replica_move
from eplb_triton.topology import Topology

NO_GAIN = -(1 << 62)
SWAP_SLOTS = 2


class Improved(NamedTuple):
    """A placement after its moves."""

    phy2log: Tensor  # [L, P] int64
    num_moves: Tensor  # [L] int64
    peak: Tensor  # [L] float64, J


def improve(
    phy2log: Tensor,
    judge: Judge,
    topology: Topology,
    price: Tensor,
    most_slots: int,
    most_moves: int,
    *,
    change_counts: bool,
) -> Improved:
    """Move until nothing pays, and at most `most_moves` times.

    A move is a swap of a slot of the GPU of largest score with one of another GPU on its node, or, with
    `change_counts`, one replica more of an expert of that GPU in place of one of another expert.

    Args:
        phy2log: [L, P] int64, every expert placed.
        judge: what a placement is judged by.
        topology: counts of the cluster.
        price: [L] float64, what a written slot must save, on the scale of the scores.
        most_slots: a layer writes at most so many; a swap writes two, another move one.

    Ties: the lowest GPU of largest score; swaps before other moves, then as the candidates are listed.
    """
    phy2log = phy2log.clone()
    peak = torch.empty(len(phy2log), dtype=torch.float64, device="cpu")
    num_moves = torch.zeros(len(phy2log), dtype=torch.int64, device="cpu")
    written = torch.zeros_like(num_moves)
    layers = torch.arange(len(phy2log), dtype=torch.int64, device="cpu")  # those still searched
    for _ in range(most_moves):
        state = state_of(phy2log[layers], judge.of(layers), topology)
        peak[layers] = state.potential.peak
        floor = least_gain(price[layers], state.potential, judge.norm)
        slots, experts, width = _best_move(
            state, judge.of(layers), topology, floor, most_slots - written[layers], change_counts=change_counts
        )
        found = width > 0
        layers = layers[found]
        if not len(layers):
            break
        phy2log[layers] = phy2log[layers].scatter(1, slots[found], experts[found])
        num_moves[layers] += 1
        written[layers] += width[found]
    if len(layers):
        peak[layers] = state_of(phy2log[layers], judge.of(layers), topology).potential.peak
    return Improved(phy2log, num_moves, peak)


def _best_move(
    state: State, judge: Judge, topology: Topology, floor: Tensor, slots_left: Tensor, *, change_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the best move of each layer writes: (slots [L, 2], experts [L, 2], number of slots [L]; 0: no move).

    A move of one slot lists it twice.
    """
    heaviest = state.potential.score.argmax(1)
    gain, slots = _best_swap(state, judge, topology, heaviest)
    experts = state.phy2log.gather(1, slots).flip(1)
    width = torch.where((gain > floor) & (slots_left >= SWAP_SLOTS), SWAP_SLOTS, 0)
    if change_counts:
        least = torch.where(width > 0, gain, floor)
        other_gain, slot, expert = best_replica_move(state, judge, topology, heaviest, floor)
        better = (other_gain > least) & (slots_left >= 1)
        width = torch.where(better, 1, width)
        slots = torch.where(better.unsqueeze(1), slot.unsqueeze(1), slots)
        experts = torch.where(better.unsqueeze(1), expert.unsqueeze(1), experts)
    return slots, experts, width


def _best_swap(state: State, judge: Judge, topology: Topology, heaviest: Tensor) -> tuple[Tensor, Tensor]:
    """The largest gain a slot [L] of a swap between the heaviest GPU and another of its node, and the slots [L, 2].

    No swap brings an expert to a GPU that holds it. Ties: the lowest partner, then the lowest slot of the heaviest
    GPU, then of the partner.
    """
    num_layers, d, s = len(heaviest), topology.gpus_per_node, topology.slots_per_gpu
    first = heaviest // d * d  # GPU of the node
    partners = first.unsqueeze(1) + torch.arange(d, dtype=torch.int64, device="cpu")  # [L, d]
    rows = torch.arange(num_layers, dtype=torch.int64, device="cpu").unsqueeze(1)
    held = state.phy2log.view(num_layers, -1, s)
    own, theirs = held[rows[:, 0], heaviest], held[rows, partners]  # [L, S], [L, d, S]
    given, taken = _Slots.of(state, own, (1, s, 1)), _Slots.of(state, theirs, (d, 1, s))
    # Sums of products are below 2**53, so that float64 has them exactly in any order.
    products = torch.bmm(given.loads, taken.loads.transpose(1, 2)).view(num_layers, s, d, s).permute(0, 2, 1, 3)
    of_heaviest = torch.bmm(taken.loads, state.gpus.loads[rows[:, 0], heaviest].double().unsqueeze(2))
    of_partners = state.gpus.loads[rows, partners].double()  # [L, d, T]
    heavy_given = products[rows[:, 0], heaviest - first, :, :].sum(2).view(num_layers, 1, s, 1)
    heavy_taken = of_heaviest.view(num_layers, d, 1, s)
    light_given = torch.bmm(of_partners, given.loads.transpose(1, 2)).view(num_layers, d, s, 1)
    light_taken = (taken.loads.view(num_layers, d, s, -1) * of_partners.unsqueeze(2)).sum(3).view(num_layers, d, 1, s)

    squares = given.square + taken.square - 2 * products
    mean, spread = taken.mean - given.mean, taken.spread - given.spread
    steps, top = judge.num_samples.view(-1, 1, 1, 1), state.potential.top.view(-1, 1, 1, 1)

    def after(gpu: Tensor, sign: int, square: Tensor) -> Tensor:
        was_mean, was_square, was_spread = (sums[rows, gpu].view(num_layers, -1, 1, 1) for sums in state.gpus[1:])
        score = scores(
            was_mean + sign * mean, was_square + square.to(torch.int64), was_spread + sign * spread, steps, judge.z
        )
        return powers(score, top, judge.norm)

    heavy = after(heaviest.unsqueeze(1), 1, squares + 2 * (heavy_taken - heavy_given))
    light = after(partners, -1, squares + 2 * (light_given - light_taken))
    before = state.potential.power.gather(1, heaviest.unsqueeze(1)) + state.potential.power.gather(1, partners)
    gain = (before.view(num_layers, d, 1, 1) - heavy - light) >> 1
    taken_there = (own.view(num_layers, 1, s, 1, 1) == theirs.view(num_layers, d, 1, 1, s)).any(4)  # [L, d, S, 1]
    given_here = (theirs.view(num_layers, d, 1, s, 1) == own.view(num_layers, 1, 1, 1, s)).any(4)  # [L, d, 1, S]
    gain.masked_fill_(taken_there | given_here, NO_GAIN)  # the heaviest GPU itself among the partners, too
    best = gain.flatten(1).argmax(1, keepdim=True)
    partner, i, j = best // (s * s), best // s % s, best % s
    slots = torch.cat((heaviest.unsqueeze(1) * s + i, (first.unsqueeze(1) + partner) * s + j), 1)
    return gain.flatten(1).gather(1, best).squeeze(1), slots


class _Slots(NamedTuple):
    """Replicas in some slots."""

    loads: Tensor  # [L, n, T] float64
    mean: Tensor  # int64
    square: Tensor  # float64
    spread: Tensor  # int64

    @classmethod
    def of(cls, state: State, experts: Tensor, shape: tuple[int, int, int]) -> _Slots:
        """Of the slots that hold `experts` [L, ...]; all but the loads in the given shape a layer."""
        listed = experts.flatten(1)
        found = state.replicas.loads.gather(1, listed.unsqueeze(2).expand(-1, -1, state.replicas.loads.shape[2]))
        loads = found.to(torch.float64)
        sums = found.sum(2), loads.square().sum(2), state.replicas.spread.gather(1, listed)
        return cls(loads, *(values.view(-1, *shape) for values in sums))
