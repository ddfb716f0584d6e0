"""Section "refine_exchange"."""

from __future__ import annotations

from itertools import combinations

from eplb_triton.policy import Exchange
from tests.stages.fourth.packing import Packs

Move = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
"""Value, heavier pack, lighter pack, slots of each."""


def refine_exchange(loads: list[int], labels: list[int], packs: Packs, target: int, rule: Exchange) -> None:
    pair_rounds(loads, labels, packs, target, rule.pair_rounds)
    match_rounds(loads, labels, packs, target, rule.match_rounds, rule.proposers)
    double_steps(loads, labels, packs, target, rule.double_steps, rule.candidates)


def positions(loads: list[int], packs: Packs) -> tuple[list[int], list[int]]:
    """Packs by position, and the load of each pack."""
    sums = [sum(loads[i] for i in items) for items in packs]
    return sorted(range(len(packs)), key=lambda q: (-sums[q], q)), sums


def best_exchange(
    loads: list[int], labels: list[int], packs: Packs, sums: list[int], h: int, partners: list[int], size: int
) -> Move | None:
    """The exchange of `size` items for as many that has the smallest value, if it gains. The first on ties."""
    best: Move | None = None
    for k in partners:
        held_h, held_k = {labels[i] for i in packs[h]}, {labels[j] for j in packs[k]}
        for mine in combinations(range(len(packs[h])), size):
            if any(labels[packs[h][s]] in held_k for s in mine):
                continue
            for theirs in combinations(range(len(packs[k])), size):
                if any(labels[packs[k][s]] in held_h for s in theirs):
                    continue
                change = sum(loads[packs[h][s]] for s in mine) - sum(loads[packs[k][s]] for s in theirs)
                value = max(sums[h] - change, sums[k] + change)
                if value < (best[0] if best else sums[h]):
                    best = value, h, k, mine, theirs
    return best


def exchange(packs: Packs, move: Move) -> None:
    _, h, k, mine, theirs = move
    for s, t in zip(mine, theirs, strict=True):
        packs[h][s], packs[k][t] = packs[k][t], packs[h][s]


def pair_rounds(loads: list[int], labels: list[int], packs: Packs, target: int, rounds: int) -> None:
    d = len(packs)
    half = d // 2
    for r in range(rounds):
        order, sums = positions(loads, packs)
        if sums[order[0]] <= target:
            return
        for q in range(half):
            move = best_exchange(loads, labels, packs, sums, order[q], [order[d - 1 - (q + r) % half]], 1)
            if move:
                exchange(packs, move)


def match_rounds(loads: list[int], labels: list[int], packs: Packs, target: int, rounds: int, proposers: int) -> None:
    d = len(packs)
    for _ in range(rounds):
        order, sums = positions(loads, packs)
        if sums[order[0]] <= target:
            return
        taken: set[int] = set()
        moves = []
        for q in range(min(max(proposers, d // 8), d // 2)):
            if sums[order[q]] <= target:
                break
            move = best_exchange(loads, labels, packs, sums, order[q], order[q + 1 :], 1)
            if q == 0 and move is None:
                return
            if move and not taken & set(move[1:3]):
                moves.append(move)
                taken |= set(move[1:3])
        for move in moves:
            exchange(packs, move)
        if not moves:
            return


def double_steps(loads: list[int], labels: list[int], packs: Packs, target: int, steps: int, candidates: int) -> None:
    d, size = len(packs), len(packs[0])
    pairs = size * (size - 1) // 2
    lights = min(d - 1, candidates // pairs**2) if pairs else 0
    for _ in range(steps if lights else 0):
        order, sums = positions(loads, packs)
        if sums[order[0]] <= target:
            return
        move = best_exchange(loads, labels, packs, sums, order[0], order[d - lights :], 2)
        if move is None:
            return
        exchange(packs, move)
