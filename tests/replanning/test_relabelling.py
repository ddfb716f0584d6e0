"""Relabelling: the same plan in other words, with few slots written."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from eplb_triton import Topology, plan
from tests.backends import CPU_BACKENDS
from tests.replanning.cases import SHAPES, relabel, traffic

assignment = pytest.importorskip("scipy.optimize", reason="needs the extra: pip install 'eplb-triton[bound]'")


def nodes(phy2log: Tensor, topology: Topology) -> list[list[list[int]]]:
    """Of one layer: nodes of GPUs of experts, all sorted."""
    gpus = phy2log.view(topology.planned_nodes, topology.gpus_per_node, -1).sort(2).values.tolist()
    return sorted(sorted(node) for node in gpus)


def shared(old: Tensor, new: Tensor) -> int:
    """How many replicas two packs share."""
    return (Counter(old.tolist()) & Counter(new.tolist())).total()


def most_kept(old: Tensor, new: Tensor, topology: Topology) -> int:
    """Slots that the best of all ways to number nodes and GPUs can keep."""

    def best(a: Tensor, b: Tensor, kept: object = shared) -> int:
        table = [[kept(x, y) for y in b] for x in a]  # type: ignore[operator]
        rows, columns = assignment.linear_sum_assignment(table, maximize=True)
        return int(sum(table[row][column] for row, column in zip(rows, columns, strict=True)))

    shape = topology.planned_nodes, topology.gpus_per_node, topology.slots_per_gpu
    return best(old.view(shape), new.view(shape), best)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("policy", ["balanced", "deepseek"])
def test_the_same_plan_with_few_slots_written(policy: str, backend: str) -> None:
    """Within 10 % of the best numbering, over all small cases and for each shape but that of two slots a GPU.

    The rule is greedy: pairs of GPUs that share k experts, k = S, S - 1, ... 0, the lowest numbers first. With two
    slots nearly every pair that shares anything shares one expert, and the first free one may be another's only one:
    14 % more are written than by the best assignment. For the other shapes it is 1 % to 3 %.
    """
    written, least = dict.fromkeys(SHAPES, 0), dict.fromkeys(SHAPES, 0)
    for shape, (experts, topology) in SHAPES.items():
        series = traffic(20, 6, 4, experts)
        for before, after in itertools.pairwise(series):
            old, new = (plan(loads, topology, policy=policy, backend="reference").phy2log for loads in (before, after))
            got = relabel(backend, old, new, topology)
            for layer in range(4):
                assert nodes(got[layer], topology) == nodes(new[layer], topology)
                kept, most = int((got[layer] == old[layer]).sum()), most_kept(old[layer], new[layer], topology)
                # A pair taken stands in the way of two others at most, which share no more.
                assert most / 2 <= kept <= most or (topology.planned_nodes > 1 and kept <= most)
                least[shape] += topology.num_replicas - most
            written[shape] += int((got != old).sum())
            assert (got != old).sum() <= (new != old).sum()
    for shape in SHAPES:
        assert least[shape] <= written[shape] <= (1.15 if shape == "two slots" else 1.03) * least[shape], shape
    assert sum(written.values()) <= 1.1 * sum(least.values())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_was_planned_before_is_found_again(backend: str) -> None:
    """GPUs and slots in any order: nothing is written."""
    experts, topology = SHAPES["grouped"]
    old = plan(traffic(21, 1, 2, experts)[0], topology, policy="balanced", backend="reference").phy2log
    packs = old.view(2, 2, 8, 5).flip(1, 2, 3).reshape(2, 80)
    assert torch.equal(relabel(backend, old, packs, topology), old)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_empty_slot_keeps_nothing(backend: str) -> None:
    topology = Topology(num_replicas=6, num_gpus=3)
    old = torch.tensor([[0, 1, -1, -1, 2, 3]])
    got = relabel(backend, old, torch.tensor([[3, 2, 0, 4, 1, 5]]), topology)
    assert got.tolist() == [[0, 4, 1, 5, 2, 3]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ties_and_doubles(backend: str) -> None:
    """The first GPU before takes the first of equal overlap; of equal experts the lowest slots are kept."""
    topology = Topology(num_replicas=6, num_gpus=2)
    old = torch.tensor([[0, 0, 1, 2, 3, 4]])
    assert relabel(backend, old, torch.tensor([[5, 0, 2, 0, 5, 4]]), topology).tolist() == [[0, 5, 2, 0, 5, 4]]


def test_backends_agree() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        draw = torch.randint(1, 5, (4,), generator=random).tolist()
        topology = Topology(num_replicas=draw[0] * draw[1] * draw[2], num_gpus=draw[0] * draw[1], num_nodes=draw[1])
        grouped = Topology(
            num_replicas=topology.num_replicas, num_gpus=topology.num_gpus, num_groups=draw[1], num_nodes=draw[1]
        )
        old = torch.randint(-1, 2 * draw[3], (3, topology.num_replicas), generator=random)
        new = torch.randint(0, 2 * draw[3], (3, topology.num_replicas), generator=random)
        for counts in (topology, grouped):
            ours, theirs = (relabel(backend, old, new, counts) for backend in CPU_BACKENDS)
            assert torch.equal(ours, theirs)
