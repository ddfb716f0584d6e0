"""Counts: D'Hondt with no more replicas of an expert than there are GPUs."""

from __future__ import annotations

from eplb_triton.cpu.arith import Floats, Ints, floats
from eplb_triton.cpu.compiled import stage
from eplb_triton.cpu.tournament import (
    DHONDT,
    NO_KEY,
    fill_quotients,
    key_expert,
    refresh_quotient,
    replace_leaf,
)


@stage
def capped_counts(loads: Floats, num_replicas: int, num_packs: int, counts: Ints, trees: Ints) -> None:
    """Fill `counts`: replica after replica to the expert of largest w / c among those of fewer than `num_packs`.

    The cap is lifted where that many replicas cannot be held without two on a GPU. Idle rows get theirs spread evenly.
    Ties: lowest expert.
    """
    e = loads.size
    cap = num_packs if num_replicas <= e * num_packs else num_replicas
    counts[:] = 1
    if num_replicas == e:
        return
    idle = True
    for i in range(e):
        idle = idle and loads[i] == 0
    if idle:
        loads = floats(e)
        loads[:] = 1
    top = fill_quotients(loads, counts, DHONDT, trees[0])
    for _ in range(num_replicas - e):
        choice = key_expert(top)
        counts[choice] += 1
        if counts[choice] < cap:
            top = refresh_quotient(loads, counts, DHONDT, trees[0], choice)
        else:
            top = replace_leaf(trees[0], e, choice, NO_KEY)
