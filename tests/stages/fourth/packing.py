"""Sections "pack", "pack_blocks" and "refine"."""

from __future__ import annotations

import numpy as np

from tests.stages.fourth.arith import EPS, Floats, largest, mean, smallest, total

Packs = list[list[int]]
"""The items of each pack, in slot order."""


def pack_plain(loads: Floats, m: int) -> Packs:
    capacity = len(loads) // m
    packs: Packs = [[] for _ in range(m)]
    if capacity == 1:
        return [[i] for i in range(m)]
    sums = [np.float32(0)] * m
    for i in largest(loads):
        q = min((q for q in range(m) if len(packs[q]) < capacity), key=lambda q: (sums[q], q))
        packs[q].append(i)
        sums[q] += loads[i]
    return packs


def pack_spread(loads: Floats, labels: list[int], m: int) -> Packs:
    capacity = len(loads) // m
    if capacity == 1 or m == 1:
        return pack_plain(loads, m)
    packs: Packs = [[] for _ in range(m)]
    sums = [np.float32(0)] * m
    delta = np.float32(1e-6 * mean(loads))
    for i in largest(loads):
        crowd = [(sum(labels[j] == labels[i] for j in items), len(items)) for items in packs]
        choice = -1
        for q in range(m):
            if len(packs[q]) == capacity:
                continue
            if (
                choice < 0
                or sums[q] + delta < sums[choice]
                or (abs(sums[q] - sums[choice]) <= delta and crowd[q] < crowd[choice])
            ):
                choice = q
        packs[choice].append(i)
        sums[choice] += loads[i]
    return packs


def pack_blocks(loads: list[int], labels: list[int], m: int) -> Packs:
    packs: Packs = [[] for _ in range(m)]
    sums = [0] * m
    items = sorted(range(len(loads)), key=lambda i: (-loads[i], labels[i], i))
    last: tuple[int, set[int]] = -1, set()  # last expert of the block before, and the GPUs that were given it there
    for start in range(0, len(items), m):
        block = items[start : start + m]
        order = sorted(range(m), key=lambda q: (sums[q], q))
        place: dict[int, int] = {}
        for i in block:
            if labels[i] != last[0]:
                break
            free = [q for q in order if q not in last[1] and q not in place.values()]
            if not free:
                break
            place[i] = free[0]
        rest = iter([q for q in order if q not in place.values()])
        for i in block:
            if i not in place:
                place[i] = next(rest)
        for i in block:
            packs[place[i]].append(i)
            sums[place[i]] += loads[i]
        expert = labels[block[-1]]
        last = expert, {place[i] for i in block if labels[i] == expert}
    return packs


class State:
    """Packs and their carried float64 loads."""

    def __init__(self, loads: Floats, packs: Packs) -> None:
        self.w = [float(load) for load in loads]
        self.packs = packs
        self.sums = [total(self.w[i] for i in items) for items in packs]

    def heaviest_items(self, q: int) -> list[int]:
        return sorted(self.packs[q], key=lambda i: (-self.w[i], i))[:2]

    def lightest_items(self, q: int) -> list[int]:
        return sorted(self.packs[q], key=lambda i: (self.w[i], i))[:2]

    def swap(self, a: int, i: int, b: int, j: int) -> None:
        self.packs[a][self.packs[a].index(i)] = j
        self.packs[b][self.packs[b].index(j)] = i
        self.sums[a] = (self.sums[a] - self.w[i]) + self.w[j]
        self.sums[b] = (self.sums[b] - self.w[j]) + self.w[i]

    def spread(self) -> float:
        return (max(self.sums) - min(self.sums)) / max(mean(self.sums), EPS)


def refine_nearest(loads: Floats, packs: Packs, steps: int, lights: int) -> None:
    if len(packs) == 1 or len(packs[0]) == 1:
        return
    state = State(loads, packs)
    for _ in range(steps):
        h = largest(state.sums)[0]
        best: tuple[float, float, int, int, int] | None = None
        for q in smallest(state.sums)[:lights]:
            difference = state.sums[h] - state.sums[q]
            if q == h or difference <= 1e-9:
                continue
            for i in sorted(packs[h]):
                for j in sorted(packs[q]):
                    score = abs(difference - 2 * (state.w[i] - state.w[j]))
                    if best is None or score < best[0]:
                        best = score, difference, i, q, j
        if best is None or not best[0] < best[1] - 1e-9:
            return
        state.swap(h, *best[2:])


def refine_corner(loads: Floats, packs: Packs, steps: int, *, at_gpus: bool = False) -> None:
    if len(packs) == 1 or len(packs[0]) == 1:
        return
    state = State(loads, packs)
    if at_gpus and state.spread() > 0.02:
        steps += 1
    allowed, step = steps, 0
    while step < allowed:
        h = largest(state.sums)[0]
        lights = [q for q in smallest(state.sums) if q != h][:2]
        single = corner_single(state, h, lights)
        if single:
            score, difference, i, q, j = single
            state.swap(h, i, q, j)
            if step == 0 and steps == 1 and state.spread() > 0.03:
                allowed += 1
            if step == 0 and steps >= 2 and score <= 0.8 * difference:
                return
        elif not corner_double(state, h, lights[0]):
            return
        step += 1


def corner_single(state: State, h: int, lights: list[int]) -> tuple[float, float, int, int, int] | None:
    best: tuple[float, float, int, int, int] | None = None
    for q in lights:
        difference = state.sums[h] - state.sums[q]
        if difference <= 1e-9:
            continue
        for i in state.heaviest_items(h):
            for j in state.lightest_items(q):
                score = abs(difference - 2 * (state.w[i] - state.w[j]))
                if best is None or score < best[0]:
                    best = score, difference, i, q, j
    return best if best and best[0] < best[1] - 1e-9 else None


def corner_double(state: State, h: int, q: int) -> bool:
    difference = state.sums[h] - state.sums[q]
    (i1, i2), (j1, j2) = state.heaviest_items(h), state.lightest_items(q)
    w = state.w
    if not abs(difference - 2 * (w[i1] + w[i2] - w[j1] - w[j2])) < difference - 1e-9:
        return False
    state.swap(h, i1, q, j1)
    state.swap(h, i2, q, j2)
    return True


def refine_peak(loads: Floats, labels: list[int], packs: Packs) -> None:
    if len(packs) == 1 or len(packs[0]) == 1:
        return
    state = State(loads, packs)
    sums, w = state.sums, state.w
    high, low = max(sums), min(sums)
    if not high > low:
        return
    order = smallest(sums)
    donors = order[-1:-3:-1]
    repeated = len(set(labels)) < len(labels)
    best: tuple[tuple[float, float, int], tuple[int, int, int, int]] | None = None
    for a in donors:
        for b in [q for q in order if q not in donors][:3]:
            if not sums[a] > sums[b]:
                continue
            for i in state.heaviest_items(a):
                for j in state.lightest_items(b):
                    after = sums.copy()
                    after[a], after[b] = (sums[a] - w[i]) + w[j], (sums[b] - w[j]) + w[i]
                    penalty = (labels[j] in [labels[k] for k in packs[a]]) + (
                        labels[i] in [labels[k] for k in packs[b]]
                    )
                    key = max(after), max(after) - min(after), penalty * repeated
                    if best is None or key < best[0]:
                        best = key, (a, i, b, j)
    if best is None:
        return
    (peak, difference, _), move = best
    if peak + EPS < high or (abs(peak - high) <= EPS and difference + EPS < high - low):
        state.swap(*move)
