"""Splitting: how many of an expert's tokens each of its replicas gets, by the loads of the step itself.

A *place* of an expert is a slot of it on a GPU that holds no lower slot of it; other slots get no tokens. Experts of
one *class* share no GPU, so that their levels can be found side by side. All numbers are whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.places import list_places

TOTAL_BITS = 23  # of float loads in fixed point: E of them stay below 2**24


def place_classes(phy2log: Tensor, num_experts: int, num_gpus: int) -> Tensor:
    """The class of every expert: experts of at least two places, in index order, take the lowest class none of whose
    experts uses one of their GPUs.

    Args:
        phy2log: [L, P] integers, expert in each slot, -1 where there is none.
        num_experts: E.
        num_gpus: D; slot k is on GPU k // (P / D).

    Returns:
        classes [L, E] int32, -1 for an expert of one place or none.
    """
    size = phy2log.shape[1] // num_gpus
    classes = []
    for slots in phy2log.tolist():
        gpus = [0] * (num_experts + 1)  # a bit for every GPU that holds the expert; the last: slots of -1
        for slot, expert in enumerate(slots):
            gpus[expert] |= 1 << slot // size
        of_layer = [-1] * num_experts
        taken: list[int] = []  # the GPUs of each class
        for expert in range(num_experts):
            if gpus[expert] & (gpus[expert] - 1):  # two bits or more
                number = next((number for number, others in enumerate(taken) if not gpus[expert] & others), len(taken))
                taken[number:] = taken[number:] or [0]
                taken[number] |= gpus[expert]
                of_layer[expert] = number
        classes.append(of_layer)
    return torch.tensor(classes, dtype=torch.int32, device="cpu").view(len(phy2log), num_experts)


def whole_counts(loads: Tensor) -> tuple[Tensor, Tensor]:
    """Float loads times a power of two of their layer, cut to whole numbers that add up to less than 2**24.

    Args:
        loads: [L, E] float32, at least 0.

    Returns:
        counts: [L, E] int64, trunc(load * 2**scale).
        scale: [L] int64: 23 - ceil(log2(E)) - floor(log2(largest load)); 0 where all are 0.
    """
    largest = loads.amax(1).to(torch.float64)
    floor = largest.frexp().exponent.to(torch.int64) - 1
    scale = torch.where(largest > 0, TOTAL_BITS - (loads.shape[1] - 1).bit_length() - floor, 0)
    factor = ((scale + 1023) << 52).view(torch.float64)
    return (loads.to(torch.float64) * factor.unsqueeze(1)).to(torch.int64), scale


def split_counts(phy2log: Tensor, classes: Tensor, counts: Tensor, num_gpus: int, rounds: int) -> Tensor:
    """Quotas: `counts` split evenly over the places of each expert, then levelled by rounds, class after class.

    Levelling an expert pours its tokens anew onto its GPUs, to one level of their loads; tokens over go to the places
    of least other load. No step makes the largest GPU load larger. Ties: lowest slot.

    Args:
        phy2log: [L, P] integers.
        classes: [L, E] int32, from `place_classes`.
        counts: [L, E] integers, at least 0, a layer's sum below 2**31.
        num_gpus: D.
        rounds: over all classes; a round that changes nothing ends them.

    Returns:
        quotas [L, P] int32, 0 where a slot is no place.
    """
    quotas = torch.zeros(phy2log.shape, dtype=torch.int32, device="cpu")
    for layer, slots in enumerate(phy2log.tolist()):
        places = list_places(slots, counts.shape[1], num_gpus)
        tokens = counts[layer].tolist()
        order = [expert for _, expert in sorted((c, e) for e, c in enumerate(classes[layer].tolist()) if c >= 0)]
        own = _split_layer(places, tokens, order, len(slots), num_gpus, rounds)
        quotas[layer] = torch.tensor(own, dtype=torch.int32, device="cpu")
    return quotas


def _split_layer(
    places: list[list[int]], tokens: list[int], order: list[int], num_slots: int, num_gpus: int, rounds: int
) -> list[int]:
    size = num_slots // num_gpus
    quota, load = [0] * num_slots, [0] * num_gpus
    for slots, w in zip(places, tokens, strict=True):
        for i, slot in enumerate(slots):
            quota[slot] = w // len(slots) + (i < w % len(slots))
            load[slot // size] += quota[slot]
    for _ in range(rounds):
        before = list(quota)
        for expert in order:  # of one class: in any order, for they share no GPU
            others = sorted((load[slot // size] - quota[slot], slot) for slot in places[expert])
            for slot, share in _level(others, tokens[expert]):
                load[slot // size] += share - quota[slot]
                quota[slot] = share
        if quota == before:
            break
    return quota


def _level(others: list[tuple[int, int]], w: int) -> list[tuple[int, int]]:
    """(slot, tokens) of `w` tokens poured onto places of (other load, slot), ascending."""
    m, total = 1, w + others[0][0]
    while m < len(others) and total > m * others[m][0]:
        total += others[m][0]
        m += 1
    level, rest = divmod(total, m)
    return [(slot, level - other + (i < rest) if i < m else 0) for i, (other, slot) in enumerate(others)]
