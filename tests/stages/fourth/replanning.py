"""Section "replanning"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.stages.fourth import counts
from tests.stages.fourth.arith import Ints, fixed_point
from tests.stages.fourth.packing import pack_blocks
from tests.stages.fourth.pipeline import partition

WINDOW, SAMPLES, W, MOVES, FRESH_MOVES = 4096, 32, 1 << 20, 64, 128
Swap = tuple[int, int, int, int]
"""GPU, its slot, partner, its slot."""


@dataclass(frozen=True)
class Cluster:
    """P, G, N, D as they are planned, and z."""

    replicas: int
    groups: int
    nodes: int
    gpus: int

    @property
    def z(self) -> float:
        return round(65536 * NormalDist().inv_cdf(1 - 1 / self.gpus)) / 65536 if self.gpus > 1 else 0.0


def replan_layer(
    history: NDArray[Any], previous: Ints | None, price: float, limit: int | None, cluster: Cluster
) -> tuple[Ints, int, int]:
    """`phy2log` [P] for a history [n, E], slots that differ from before, slots filled."""
    y = samples(history)
    if previous is None:
        return fresh_plan(y, None, cluster).ravel(), 0, 0
    before, fills = fill(previous, y, cluster)
    moved = before.copy()
    price_s = price * (len(y) * W / cluster.gpus)
    limit = cluster.replicas * MOVES if limit is None else limit
    planned = moved
    if search(y, moved, cluster, MOVES, price_s, limit, swaps_only=False) == MOVES:
        fresh = relabel(before, fresh_plan(y, before, cluster), cluster)
        n_f, n_a = int((fresh != before).sum()), int((moved != before).sum())
        if n_f <= limit and State(y, fresh, cluster).j + price_s * n_f < State(y, moved, cluster).j + price_s * n_a:
            planned = fresh
    return planned.ravel(), int((planned != before).sum()), fills


def samples(history: NDArray[Any]) -> Ints:
    """y [T, E]."""
    loads = history[-WINDOW:].astype(np.float32)
    heaviest = float(loads.max())
    s = 28 - (math.frexp(heaviest)[1] - 1) if heaviest else 0
    x = np.trunc(np.ldexp(loads.astype(np.float64), s)).astype(np.int64)
    x = x[x.sum(1) > 0]
    if len(x) == 0:
        x = np.ones((1, history.shape[1]), np.int64)
    x = recent(x)
    k = min(SAMPLES, len(x))
    y = x[[len(x) - 1 - i * (len(x) // k) for i in range(k)]]
    y = y * W // y.sum(1, keepdims=True)
    levelled: Ints = np.maximum(y + share(x) - y.sum(0) // k, 0)
    return levelled


def share(x: Ints) -> Ints:
    of_expert = x.sum(0)
    parts: Ints = of_expert * W // of_expert.sum()
    return parts


def recent(x: Ints) -> Ints:
    """The steps since the last change of traffic."""
    n, b = len(x), len(x) // 4
    if n < 8:
        return x
    newest = share(x[n - b :])
    for k in range(1, n // b):
        if np.abs(share(x[n - (k + 1) * b : n - k * b]) - newest).sum() > W // 2:
            return x[n - k * b :]
    return x


def fill(previous: Ints, y: Ints, cluster: Cluster) -> tuple[Ints, int]:
    """[D, S] without slots of -1, and how many there were."""
    before = previous.reshape(cluster.gpus, -1).copy()
    m = y.sum(0).tolist()
    c = np.bincount(before[before >= 0], minlength=len(m)).tolist()
    empty = np.argwhere(before < 0)
    for gpu, slot in empty:
        missing = [e for e in range(len(m)) if c[e] == 0]
        pool = [e for e in range(len(m)) if e not in before[gpu]] or list(range(len(m)))
        best = (missing or pool)[0]
        for e in missing or pool:
            if m[e] * max(c[best], 1) > m[best] * max(c[e], 1):
                best = e
        before[gpu, slot] = best
        c[best] += 1
    return before, len(empty)


class State:
    """A placement [D, S] with Y, v and the sums of each GPU."""

    def __init__(self, y: Ints, place: Ints, cluster: Cluster) -> None:
        self.y, self.place, self.z = y, place, cluster.z
        self.c = np.bincount(place.ravel(), minlength=y.shape[1])
        self.replica = y // self.c  # Y [T, E]
        self.v = spread(self.replica)
        self.load = self.replica.T[place].sum(1)  # [D, T]
        self.u = self.v[place].sum(1)
        self.scores = self.score(self.load, self.u)
        self.top = int(self.scores.max())
        self.powers = self.pow16(self.scores)
        self.f = int(self.powers.sum())
        self.j = self.top * math.sqrt(math.sqrt(math.sqrt(math.sqrt(self.f / (len(place) * 2**30)))))

    def score(self, load: Ints, u: Ints) -> Ints:
        """Of loads [..., T]."""
        a, q = load.sum(-1), (load * load).sum(-1)
        halved = np.maximum(load.shape[-1] * q - a * a + u, 0) >> 1
        scores: Ints = a + np.trunc(self.z * np.sqrt(halved.astype(np.float64))).astype(np.int64)
        return scores

    def pow16(self, scores: Ints) -> Ints:
        r = (scores << 30) // self.top
        above = r > 1 << 30
        r[above] = 0
        for _ in range(4):
            r = (r * r) >> 30
        r[above] = 1 << 46
        return r


def spread(replica: Ints) -> Ints:
    """v of replicas Y [T, ...]."""
    total = replica.sum(0)
    v: Ints = len(replica) * (replica * replica).sum(0) - total * total
    return v


def search(y: Ints, place: Ints, cluster: Cluster, steps: int, price_s: float, limit: int, *, swaps_only: bool) -> int:
    """Change `place`; the number of steps made."""
    written = 0
    for step in range(steps):
        state = State(y, place, cluster)
        floor = math.trunc(min(max(price_s * 16 * state.f / state.j, 1), 2.0**62))
        h = int(state.scores.argmax())
        size = cluster.gpus // cluster.nodes
        node = list(range(h // size * size, h // size * size + size))
        best_gain, best_swap = best_swap_of(state, h, node) if written + 2 <= limit else (0, None)
        best_move = None
        if not swaps_only and written + 1 <= limit:
            best_move = best_move_of(state, h, node, max(floor, best_gain), floor)
        if best_move is not None:
            gpu, slot, expert = best_move
            place[gpu, slot] = expert
            written += 1
        elif best_swap is not None and best_gain > floor:
            gpu, i, other, j = best_swap
            place[gpu, i], place[other, j] = place[other, j], place[gpu, i]
            written += 2
        else:
            return step
    return steps


def best_swap_of(state: State, h: int, node: list[int]) -> tuple[int, Swap | None]:
    partners = np.array([o for o in node if o != h], np.int64)
    if len(partners) == 0:
        return 0, None
    mine, theirs = state.place[h], state.place[partners]  # [S], [O, S]
    change = state.replica.T[theirs][:, None] - state.replica.T[mine][None, :, None]  # [O, S, S, T]
    change_u = state.v[theirs][:, None] - state.v[mine][None, :, None]
    after_h = state.score(state.load[h] + change, state.u[h] + change_u)
    after_o = state.score(state.load[partners][:, None, None] - change, state.u[partners][:, None, None] - change_u)
    before = state.powers[h] + state.powers[partners]
    gain = (before[:, None, None] - state.pow16(after_h) - state.pow16(after_o)) >> 1
    banned = np.isin(theirs, mine)[:, None, :] | (mine[None, :, None] == theirs[:, None, :]).any(2)[:, :, None]
    gain[banned] = np.iinfo(np.int64).min
    o, i, j = np.unravel_index(int(gain.argmax()), gain.shape)
    return int(gain[o, i, j]), (h, int(i), int(partners[o]), int(j))


def best_move_of(state: State, h: int, node: list[int], least: int, floor: int) -> tuple[int, int, int] | None:
    """The first move of largest gain above `least`: GPU, slot, expert."""
    best: tuple[int, int, int] | None = None
    held = np.stack([(state.place == e).sum(1) for e in range(len(state.c))])  # [E, D]
    for a in dict.fromkeys(state.place[h].tolist()):
        if state.c[a] >= len(node):
            continue
        more = recounted(state, a, 1)
        load_a, u_a = changed(state, held, a, more)
        if state.f - int(state.pow16(state.score(state.load + load_a, state.u + u_a)).sum()) <= floor:
            continue
        for b in np.flatnonzero(state.c >= 2).tolist():
            receivers = [d for d in node if held[b, d] and not held[a, d]]
            if b == a or not receivers:
                continue
            fewer = recounted(state, b, -1)
            load_b, u_b = changed(state, held, b, fewer)
            load, u = state.load + load_a + load_b, state.u + u_a + u_b
            powers = state.pow16(state.score(load, u))
            received = state.pow16(state.score(load[receivers] + more[0] - fewer[0], u[receivers] + more[1] - fewer[1]))
            gains = state.f - (int(powers.sum()) - powers[receivers] + received)
            k = int(gains.argmax())
            if gains[k] > least:
                least = int(gains[k])
                best = receivers[k], int(np.flatnonzero(state.place[receivers[k]] == b)[0]), a
    return best


def recounted(state: State, expert: int, by: int) -> tuple[Ints, Any]:
    """Y [T] and v of a replica of `expert` if its count changes."""
    replica = state.y[:, expert] // (state.c[expert] + by)
    return replica, spread(replica)


def changed(state: State, held: Ints, expert: int, after: tuple[Ints, Any]) -> tuple[Ints, NDArray[np.int64]]:
    """What that changes of the sums of each GPU."""
    return held[expert][:, None] * (after[0] - state.replica[:, expert]), held[expert] * (after[1] - state.v[expert])


def fresh_plan(y: Ints, before: Ints | None, cluster: Cluster) -> Ints:
    m = y.sum(0)
    size = cluster.replicas // cluster.gpus
    d, p = cluster.gpus // cluster.nodes, cluster.replicas // cluster.nodes
    deviation = np.sqrt(np.maximum(len(y) * (y * y).sum(0) - m * m, 0).astype(np.float64))
    w = np.maximum(m + (cluster.z / math.sqrt(size)) * deviation, 1).astype(np.float32)
    place = np.empty((cluster.gpus, size), np.int64)
    if before is None:
        of_group = m.reshape(cluster.groups, -1)
        loads = of_group.sum(1).astype(np.float32)
        packs = partition(loads, fixed_point(loads, cluster.groups // cluster.nodes)[0], cluster.nodes)
        ids = np.arange(len(m)).reshape(of_group.shape)
        nodes = [sorted(ids[groups].ravel().tolist()) for groups in packs]
    else:
        nodes = [sorted(set(node.ravel().tolist())) for node in before.reshape(cluster.nodes, d, size)]
    for node, experts in enumerate(nodes):
        c = counts.capped(w[experts], p - len(experts), d)
        labels = [expert for expert, _ in counts.list_by_expert(c)]
        fixed = fixed_point((w[experts] / c.astype(np.float32))[labels], size)[0]
        for gpu, items in enumerate(pack_blocks(fixed, labels, d)):
            place[node * d + gpu] = [experts[labels[i]] for i in items]
    search(y, place, cluster, FRESH_MOVES, 0.0, 2 * FRESH_MOVES, swaps_only=True)
    return place


def relabel(before: Ints, fresh: Ints, cluster: Cluster) -> Ints:
    d = cluster.gpus // cluster.nodes
    result = np.full_like(before, -1)
    for node in range(cluster.nodes):
        gpus = range(node * d, node * d + d)
        pairs = [(-overlap(before[old], fresh[new]), old, new) for old in gpus for new in gpus]
        done: tuple[set[int], set[int]] = set(), set()
        for _, old, new in sorted(pairs):
            if old in done[0] or new in done[1]:
                continue
            done[0].add(old)
            done[1].add(new)
            result[old] = keep(before[old].tolist(), fresh[new].tolist())
    return result


def overlap(old: Ints, new: Ints) -> int:
    return sum(min(int((old == e).sum()), int((new == e).sum())) for e in set(old.tolist()))


def keep(old: list[int], new: list[int]) -> list[int]:
    """The experts of `new` in the slots of `old`, where that holds them."""
    result = [-1] * len(old)
    rest = []
    for expert in new:
        kept = next((k for k, other in enumerate(old) if other == expert and result[k] < 0), None)
        if kept is None:
            rest.append(expert)
        else:
            result[kept] = expert
    others = iter(rest)
    return [expert if expert >= 0 else next(others) for expert in result]
