"""The places of each expert: its slots, at most one a GPU."""

from __future__ import annotations


def list_places(slots: list[int], num_experts: int, num_gpus: int) -> list[list[int]]:
    """The places of each expert, ascending; `slots`: the expert in each slot of a layer, or -1."""
    places: list[list[int]] = [[] for _ in range(num_experts)]
    size = len(slots) // num_gpus
    for slot, expert in enumerate(slots):
        if expert >= 0 and (not places[expert] or places[expert][-1] // size != slot // size):
            places[expert].append(slot)
    return places
