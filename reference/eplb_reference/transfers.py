"""Transfers: from which slot of the placement in force each slot of the next one is filled, and in which batch."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.places import list_places


def choose_sources(ahead: Tensor, live: Tensor, num_experts: int, num_gpus: int, gpus_per_node: int) -> Tensor:
    """The slot of `live` that each slot of `ahead` is filled from; slots ascending.

    On its own GPU, a copy; else on its node; else anywhere. Of several GPUs on its node, or anywhere, the one that has
    sent least so far in the layer; ties: lowest slot.

    Args:
        ahead: [L, P] integers, expert in each slot, -1 where there is none.
        live: [L, P], as ahead.
        num_experts: E.
        num_gpus: D; slot k is on GPU k // (P / D).
        gpus_per_node: GPUs of a node.

    Returns:
        [L, P] int32: the slot itself where it is kept, as one that is to hold none; -1 where no slot holds the expert.
    """
    size = ahead.shape[1] // num_gpus
    source = [
        _sources_of_layer(after, before, list_places(before, num_experts, num_gpus), size, gpus_per_node)
        for after, before in zip(ahead.tolist(), live.tolist(), strict=True)
    ]
    return torch.tensor(source, dtype=torch.int32, device="cpu").view(ahead.shape)


def _sources_of_layer(
    after: list[int], before: list[int], places: list[list[int]], size: int, gpus_per_node: int
) -> list[int]:
    sent = [0] * (len(after) // size)
    source = list(range(len(after)))
    for slot, expert in enumerate(after):
        if expert in (-1, before[slot]):
            continue
        taker = slot // size
        keys = []
        for place in places[expert]:
            giver = place // size
            far = 0 if giver == taker else 1 if giver // gpus_per_node == taker // gpus_per_node else 2
            keys.append((far, sent[giver], place))
        far, _, source[slot] = min(keys, default=(0, 0, -1))
        if far:
            sent[source[slot] // size] += 1
    return source


def batch_transfers(source: Tensor, num_gpus: int) -> Tensor:
    """Batches in which no GPU takes part in more than one transfer: each gets the lowest that fits, slots ascending.

    Args:
        source: [L, P] int32, from `choose_sources`.
        num_gpus: D.

    Returns:
        [L, P] int32, -1 for a slot that nothing comes to from another GPU.
    """
    batch = torch.full_like(source, -1)
    size = source.shape[1] // num_gpus
    for layer, sources in enumerate(source.tolist()):
        busy: list[set[int]] = [set() for _ in range(num_gpus)]  # batches of each GPU
        for slot, place in enumerate(sources):
            giver, taker = place // size, slot // size
            if place >= 0 and giver != taker:
                number = 0
                while number in busy[giver] | busy[taker]:
                    number += 1
                busy[giver].add(number)
                busy[taker].add(number)
                batch[layer, slot] = number
    return batch


def count_transfers(source: Tensor, batch: Tensor, num_gpus: int, gpus_per_node: int) -> Tensor:
    """[L, 5] int32: slots copied within their GPU; fetched from another; of these, from another node; whose expert no
    slot holds; and batches."""
    slot = torch.arange(source.shape[1], dtype=torch.int32, device="cpu")
    size = source.shape[1] // num_gpus
    found, fetched = source >= 0, batch >= 0
    afar = source // (size * gpus_per_node) != slot // (size * gpus_per_node)
    copied = found & ~fetched & (source != slot)
    slots = torch.stack((copied, fetched, fetched & afar, ~found), 2).sum(1)
    batches = (batch.amax(1) + 1) if len(batch) else batch.new_empty(0)
    return torch.cat((slots, batches.unsqueeze(1)), 1).to(torch.int32)
