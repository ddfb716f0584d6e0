"""A model of a few numbers: every expert's weights say which expert they are, so that a wrong slot is seen."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS, EXPERTS, REPLICAS, GROUPS, RANKS = 4, 16, 24, 4, 3
WIDTHS = (3, 5)
"""Numbers of an expert in each of its two weights."""


def in_order(replicas: int = REPLICAS) -> Tensor:
    return (torch.arange(replicas) % EXPERTS).repeat(LAYERS, 1)


def weight_of(layer: int, which: int, expert: int) -> Tensor:
    """What `expert` holds as its weight `which` in `layer`."""
    return (expert * 1000 + layer * 100 + which * 10) + torch.arange(WIDTHS[which], dtype=torch.float32)


def weights_of(slots: Tensor) -> list[list[Tensor]]:
    """[L][2] tensors [slots of a rank, width], for the experts [L, slots of a rank]; of expert -1: nothing, -1."""
    return [
        [
            torch.stack([weight_of(layer, which, int(e)) if e >= 0 else torch.full((width,), -1.0) for e in row])
            for which, width in enumerate(WIDTHS)
        ]
        for layer, row in enumerate(slots)
    ]


def wrong_slots(weights: list[list[Tensor]], slots: Tensor) -> list[tuple[int, int]]:
    """(layer, slot) whose weights are not those of the expert [L, slots of a rank] that the map names."""
    return [
        (layer, slot)
        for layer, row in enumerate(slots.tolist())
        for slot, expert in enumerate(row)
        if not all(torch.equal(weights[layer][which][slot], weight_of(layer, which, expert)) for which in (0, 1))
    ]


def of_rank(slots: Tensor, rank: int) -> Tensor:
    """The part of [L, P] that a rank holds."""
    width = REPLICAS // RANKS
    return slots[:, rank * width : (rank + 1) * width]


def shifting_loads(slots: Tensor, step: int, rank: int, seed: int = 0) -> Tensor:
    """[L, P] tokens that a rank sends to each slot: the hot experts are others every six steps."""
    draw = torch.Generator().manual_seed(1000 * seed + 100 * rank + step)
    tokens = torch.randint(0, 50, tuple(slots.shape), generator=draw)
    return tokens * (1 + 9 * ((slots + step // 6 + seed) % 7 == 0))
