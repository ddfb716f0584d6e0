"""Sections "replicate", "replicate_capped", "replicate_waterfill", "fixup" and "fixup_paired"."""

from __future__ import annotations

import math

import numpy as np

from eplb_triton.policy import Fixup, Paired
from tests.stages.fourth.arith import EPS, EPS32, Floats, Ints, divide, largest, mean, smallest, total

Replicas = list[tuple[int, int]]
"""The replica list: (expert, rank)."""

ONE, TWO = np.float32(1), np.float32(2)


def dhondt(w: Floats, c: Ints) -> int:
    return int(np.argmax(divide(w, c)))


def sainte_lague(w: Floats, c: Ints) -> int:
    return int(np.argmax(w / (TWO * c.astype(np.float32) - ONE)))


def peak_aware(w: Floats, c: Ints) -> int:
    avg = divide(w, c)
    second = avg[largest(avg)[min(1, len(avg) - 1)]]
    by_d, by_s = dhondt(w, c), sainte_lague(w, c)
    new_d, new_s = (w[i] / np.float32(c[i] + 1) for i in (by_d, by_s))
    peak_d, peak_s = max(second, new_d), max(second, new_s)
    if peak_d + EPS32 < peak_s:
        return by_d
    return by_d if abs(peak_d - peak_s) <= EPS32 and min(second, new_d) <= min(second, new_s) else by_s


def gated(w: Floats, c: Ints) -> int:
    avg = divide(w, c)
    order = largest(avg)
    quotient = w / (TWO * c.astype(np.float32) - ONE)
    by_d, by_s = order[0], min(range(len(w)), key=lambda i: (-quotient[i], avg[i], i))
    unequal = avg[by_d] / max(np.float32(mean(avg)), EPS32) - ONE
    if min(max(unequal, np.float32(0)), ONE) <= EPS32:
        return by_d
    peaks = []
    for i in (by_d, by_s):
        others = avg[order[min(1, len(w) - 1)]] if i == order[0] else avg[order[0]]
        new = w[i] / np.float32(c[i] + 1)
        peaks.append((max(others, new), min(others, new)))
    (peak_d, lower_d), (peak_s, lower_s) = peaks
    if peak_d + EPS32 < peak_s:
        return by_d
    if not abs(peak_d - peak_s) <= EPS32:
        return by_s
    if lower_d + EPS32 < lower_s:
        return by_d
    return by_d if abs(lower_d - lower_s) <= EPS32 and c[by_d] <= c[by_s] else by_s


TAILS = {"dispersion": sainte_lague, "simulated": sainte_lague, "peak_aware": peak_aware, "gated": gated}


def tail_length(rows: list[Floats], redundant: int, rule: str) -> int:
    """T, the same for all rows of the call."""
    fixed = max(1, (redundant + 9) // 10)
    if rule == "dhondt":
        return 0
    if rule == "dispersion":
        s = min(max(mean([variation(w) for w in rows]), 0.7), 1.3)
        return min(max(round((0.10 * redundant) * s), 1), redundant)
    if rule == "simulated":
        tried = sorted({max(1, fixed - 1), fixed, min(redundant, fixed + 1)})
        return min(tried, key=lambda t: mean([peak_after(w, redundant - t, t) for w in rows]))
    return fixed


def variation(w: Floats) -> float:
    if len(w) == 1:
        return 0.0
    m = mean(w)
    return math.sqrt(total((float(x) - m) * (float(x) - m) for x in w) / (len(w) - 1)) / max(m, EPS)


def peak_after(w: Floats, bulk: int, tail: int) -> float:
    c = np.ones(len(w), np.int64)
    for k in range(bulk + tail):
        c[dhondt(w, c) if k < bulk else sainte_lague(w, c)] += 1
    return float(divide(w, c).max())


def replicate(w: Floats, redundant: int, tail: int, rule: str) -> tuple[Ints, Replicas]:
    c = np.ones(len(w), np.int64)
    replicas = [(i, 0) for i in range(len(w))]
    for k in range(redundant):
        i = dhondt(w, c) if k < redundant - tail else TAILS[rule](w, c)
        replicas.append((i, int(c[i])))
        c[i] += 1
    return c, replicas


def list_by_expert(c: Ints) -> Replicas:
    return [(i, rank) for i in range(len(c)) for rank in range(c[i])]


def capped(w: Floats, redundant: int, gpus: int) -> Ints:
    w = w if w.any() else np.ones_like(w)
    c = np.ones(len(w), np.int64)
    lifted = len(w) + redundant > len(w) * gpus
    for _ in range(redundant):
        c[int(np.argmax(np.where((c < gpus) | lifted, divide(w, c), np.float32(-1))))] += 1
    return c


def waterfill(w: Floats, p: int) -> Ints:
    e = len(w)
    if p == e:
        return np.ones(e, np.int64)
    if not w.any():
        return np.array([p // e + (i < p % e) for i in range(e)])
    lo, hi = 0.0, max(float(w.max()), 1.0)

    def under(level: float) -> Ints:
        need: Ints = np.maximum(1, np.ceil(w / np.float32(level)).astype(np.int64))
        return need

    for _ in range(40):
        mid = (lo + hi) / 2
        if under(mid).sum() <= p:
            hi = mid
        else:
            lo = mid
    c = under(hi)
    extras = p - int(c.sum())
    tail = min(max(1, round(0.1 * (p - e))), extras)
    while extras > tail:
        chosen = largest(divide(w, c))[: min(extras - tail, e)]
        c[chosen] += 1
        extras -= len(chosen)
    for _ in range(tail):
        c[lowest_peak(w, c)] += 1
    return c


def lowest_peak(w: Floats, c: Ints) -> int:
    if len(w) == 1:
        return 0
    avg, r = divide(w, c), c.astype(np.float32)
    first, second = largest(avg)[:2]

    def key(i: int) -> tuple[float, float, float]:
        others = avg[second] if i == first else avg[first]
        return max(others, w[i] / np.float32(c[i] + 1)), others, -w[i]

    return min((int(np.argmax(w / (r + ONE))), int(np.argmax(w / (TWO * r + ONE)))), key=key)


def fix_up(w: Floats, c: Ints, replicas: Replicas, fix: Fixup) -> None:
    """Moves replicas in `c` and in the list."""
    for _ in range(fix.moves):
        move = best_move(w, c, fix)
        if move is None:
            return
        a, b = move
        if replicas:
            replicas[replicas.index((a, int(c[a]) - 1))] = (b, int(c[b]))
        c[a] -= 1
        c[b] += 1


def best_move(w: Floats, c: Ints, fix: Fixup) -> tuple[int, int] | None:
    avg = divide(w, c)
    order = largest(avg)
    donors = [a for a in (order[:2] if fix.donors == "top" else order) if c[a] > 1][:2]
    held: tuple[float, ...] | None = None
    found = None
    for a in donors:
        for b in smallest(avg)[:2]:
            if a == b:
                continue
            key = judge(w, c, avg, order, a, b, fix)
            if not key[0] + EPS < float(avg[order[0]]):
                continue
            if fix.tie == "first":
                better = held is None or key[0] < held[0]
            elif fix.tie == "second_peak":
                better = held is None or key[0] < held[0] or (abs(key[0] - held[0]) <= EPS and key[1] < held[1])
            else:
                better = held is None or key < held
            if better:
                held, found = key, (a, b)
    return found


def judge(w: Floats, c: Ints, avg: Floats, order: list[int], a: int, b: int, fix: Fixup) -> tuple[float, ...]:
    """(peak, second peak, a, b) of moving a replica from a to b."""
    if fix.peak == "exact":
        after = avg.copy()
        after[a], after[b] = w[a] / np.float32(c[a] - 1), w[b] / np.float32(c[b] + 1)
        terms = sorted(after.tolist(), reverse=True)
    else:
        least = order[0] if fix.peak == "others" and a != order[0] else order[1]
        new_a, new_b = float(w[a]) / float(c[a] - 1), float(w[b]) / float(c[b] + 1)
        terms = sorted([float(avg[least]), new_a, new_b], reverse=True)
    return terms[0], terms[1], a, b


def pairing_value(w: Floats, c: Ints) -> tuple[np.float32, int, int]:
    """The largest sum of the best pairing and its two experts, heavier first."""
    avg = divide(w, c)
    items = sorted((i for i, _ in list_by_expert(c)), key=lambda i: (-avg[i], i))
    sums = [avg[items[k]] + avg[items[-1 - k]] for k in range(len(items) // 2)]
    k = int(np.argmax(sums))
    return sums[k], items[k], items[-1 - k]


def fix_up_paired(w: Floats, c: Ints, gpus: int, fix: Paired) -> None:
    for _ in range(fix.moves):
        before, *receivers = pairing_value(w, c)
        givers = [i for i in range(len(w)) if c[i] > 1]
        givers.sort(key=lambda i: (w[i] / np.float32(c[i] - 1), i))
        best: tuple[np.float32, int, int] | None = None
        for a in givers[: fix.donors]:
            for b in receivers:
                if a != b and c[b] < gpus:
                    after = c.copy()
                    after[a] -= 1
                    after[b] += 1
                    value = pairing_value(w, after)[0]
                    if best is None or value < best[0]:
                        best = value, a, b
        if best is None or not best[0] + np.float32(1e-6) * before < before:
            return
        c[best[1]] -= 1
        c[best[2]] += 1
