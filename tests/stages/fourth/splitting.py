"""Section "splitting"."""

from __future__ import annotations

import numpy as np

from tests.stages.fourth.arith import Ints

MASK = (1 << 32) - 1


def places(phy2log: Ints, num_experts: int, size: int) -> list[list[int]]:
    """The slots of each expert, one for each GPU that holds it."""
    found: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(phy2log):
        if expert >= 0 and all(other // size != slot // size for other in found[expert]):
            found[expert].append(slot)
    return found


def classes(of: list[list[int]], size: int) -> list[int]:
    used: list[set[int]] = []  # GPUs of each class
    result = []
    for slots in of:
        gpus = {slot // size for slot in slots}
        if len(slots) < 2:
            result.append(-1)
            continue
        number = next((k for k, taken in enumerate(used) if not taken & gpus), len(used))
        if number == len(used):
            used.append(set())
        used[number] |= gpus
        result.append(number)
    return result


def split(phy2log: Ints, counts: list[int], size: int, rounds: int) -> list[int]:
    """Quota of each slot."""
    of = places(phy2log, len(counts), size)
    quota = [0] * len(phy2log)
    gpus = [0] * (len(phy2log) // size)
    for expert, slots in enumerate(of):
        for n, slot in enumerate(slots):
            quota[slot] = counts[expert] // len(slots) + (n < counts[expert] % len(slots))
            gpus[slot // size] += quota[slot]
    number = classes(of, size)
    order = sorted((e for e in range(len(of)) if number[e] >= 0 and counts[e]), key=lambda e: (number[e], e))
    for _ in range(rounds):
        for expert in order:
            level(counts[expert], of[expert], quota, gpus, size)
    return quota


def level(w: int, slots: list[int], quota: list[int], gpus: list[int], size: int) -> None:
    """Pour the tokens of an expert onto its GPUs up to one level."""
    b = sorted((gpus[slot // size] - quota[slot], slot) for slot in slots)
    q, poured = 1, w + b[0][0]
    while q < len(b) and poured > q * b[q][0]:
        poured += b[q][0]
        q += 1
    height, rest = divmod(poured, q)
    for n, (other, slot) in enumerate(b):
        gpus[slot // size] -= quota[slot]
        quota[slot] = height - other + (n < rest) if n < q else 0
        gpus[slot // size] += quota[slot]


def slot_at(slots: list[int], quotas: list[int], g: int) -> int:
    """The first place whose cumulative quota exceeds g."""
    for slot, share in zip(slots, quotas, strict=True):
        if g < share:
            return slot
        g -= share
    raise AssertionError("g is below the total")


def slots_exact(ids: Ints, of: list[list[int]], quota: list[int]) -> Ints:
    """`ids` [ranks, tokens, k] to slots."""
    seen = [0] * len(of)
    result = np.full_like(ids, -1)
    for at, expert in np.ndenumerate(ids):
        if expert >= 0:
            result[at] = slot_at(of[expert], [quota[slot] for slot in of[expert]], seen[expert])
            seen[expert] += 1
    return result


def slots_hashed(ids: Ints, of: list[list[int]], quota: list[int], layer: int, salt: int) -> Ints:
    """`ids` [tokens, k] of one rank to slots."""
    result = np.full_like(ids, -1)
    for (row, k), expert in np.ndenumerate(ids):
        if expert >= 0:
            shares = [quota[slot] for slot in of[expert]]
            shares = shares if sum(shares) else [1] * len(shares)
            result[row, k] = slot_at(of[expert], shares, hashed(row, layer, salt) * sum(shares) >> 32)
    return result


def hashed(row: int, layer: int, salt: int) -> int:
    h = (row * 0x9E3779B1 ^ layer * 0x85EBCA77 ^ salt * 0xC2B2AE3D) & MASK
    h ^= h >> 16
    h = h * 0x7FEB352D & MASK
    h ^= h >> 15
    h = h * 0x846CA68B & MASK
    return h ^ h >> 16


def table(of: list[list[int]], quota: list[int], width: int) -> list[list[int]]:
    result = []
    for slots in of:
        shares = [quota[slot] for slot in slots]
        shares = shares if sum(shares) else [1] * len(slots)
        total = sum(shares)
        times = [share * width // total for share in shares]
        remainders = sorted(range(len(slots)), key=lambda i: (-(shares[i] * width % total), i))
        for i in remainders[: width - sum(times)]:
            times[i] += 1
        result.append([slot for slot, n in zip(slots, times, strict=True) for _ in range(n)])
    return result
