"""Section "transfers"."""

from __future__ import annotations

from eplb_triton import Topology
from tests.stages.fourth.arith import Ints


def transfers(ahead: Ints, live: Ints, topology: Topology) -> tuple[list[int], list[int]]:
    """Source and batch of each slot of a layer."""
    gpus, nodes, size = topology.num_gpus, topology.num_nodes, len(live) // topology.num_gpus
    of_node = gpus // nodes if gpus % nodes == 0 else gpus
    sent, taken, source, batch = [0] * gpus, set[tuple[int, int]](), [], []
    for k, e in enumerate(ahead):
        mine = k // size
        if e in (-1, live[k]):
            source.append(k)
            batch.append(-1)
            continue
        all_of = [j for j, held in enumerate(live) if held == e]
        here = [j for j in all_of if j // size == mine]
        near = [j for j in all_of if j // size // of_node == mine // of_node]
        chosen = here[0] if here else min(near or all_of, key=lambda j: (sent[j // size], j), default=-1)
        source.append(chosen)
        if chosen < 0 or here:
            batch.append(-1)
            continue
        theirs = chosen // size
        sent[theirs] += 1
        number = next(n for n in range(len(live)) if not {(n, mine), (n, theirs)} & taken)
        taken |= {(number, mine), (number, theirs)}
        batch.append(number)
    return source, batch
