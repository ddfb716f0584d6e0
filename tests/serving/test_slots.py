"""Where tokens go: every slot its quota, or its share by a hash; tables and static maps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from eplb_triton import Topology
from eplb_triton.serving.dispatch import classify, dispatch_map, slots_of, split, table
from tests.backends import CPU_BACKENDS
from tests.serving.shares import drawn, sums


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("seed", range(8))
def test_over_all_ranks_every_slot_gets_exactly_its_quota(seed: int, backend: str) -> None:
    case, random = drawn(seed), torch.Generator().manual_seed(seed)
    experts, ranks, layer = case.counts.shape[1], 3, 1
    held = torch.unique(case.phy2log[layer][case.phy2log[layer] >= 0])
    ids = held[torch.randint(len(held), (ranks, 50, 2), generator=random)]
    ids[torch.rand(ids.shape, generator=random) < 0.1] = -1
    counts = torch.zeros(ranks, 2, experts, dtype=torch.int64)
    counts[:, layer] = torch.stack([torch.bincount(rank[rank >= 0], minlength=experts) for rank in ids])
    classes = classify(case.phy2log, experts, case.topology, backend=backend)
    got, offsets = torch.zeros(case.topology.num_replicas, dtype=torch.int64), torch.empty(2, experts).int()
    for rank in range(ranks):
        quotas = split(counts, case.phy2log, classes, case.topology, rank=rank, offsets=offsets, backend=backend)
        slots = slots_of(
            ids[rank], layer, quotas, case.phy2log, experts, case.topology, offsets=offsets, backend=backend
        )
        assert torch.equal(slots < 0, ids[rank] < 0)
        assert torch.equal(case.phy2log[layer][slots[slots >= 0]], ids[rank][slots >= 0])
        got += torch.bincount(slots[slots >= 0], minlength=len(got))
    assert torch.equal(got, quotas[layer].long())


@pytest.mark.parametrize("salt", [0, 1, -5, 2**40 + 3])
def test_hashed_shares_are_the_quotas(salt: int) -> None:
    phy2log = torch.tensor([[0, 1, 0, 2, 0, 1]])
    topology = Topology(num_replicas=6, num_gpus=3)
    quotas = torch.tensor([[700, 1, 250, 80, 50, 0]], dtype=torch.int32)
    tokens = 1_000_000
    ids = torch.tensor([[0, 1]]).expand(tokens, 2).contiguous()
    slots = slots_of(ids, 0, quotas, phy2log, 3, topology, salt=salt, backend="cpu")
    got = torch.bincount(slots.flatten(), minlength=6)
    for slot, quota in ((0, 700), (2, 250), (4, 50)):
        share = quota / 1000
        assert abs(int(got[slot]) - share * tokens) < 5 * math.sqrt(tokens * share * (1 - share))
    assert got[[1, 3, 5]].tolist() == [tokens, 0, 0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_quotas_of_other_steps(backend: str) -> None:
    """No quota at all counts as one each; tokens beyond the quotas go to the last place that has any."""
    phy2log = torch.tensor([[0, 0, 0, 1, -1, 2]])
    topology = Topology(num_replicas=6, num_gpus=3)
    quotas = torch.tensor([[0, 0, 0, 3, 0, 0]], dtype=torch.int32)
    ids = torch.zeros(3000, 1, dtype=torch.int32)
    placed = phy2log, 4, topology
    slots = slots_of(ids, 0, quotas, *placed, backend=backend).flatten()
    assert set(slots.tolist()) == {0, 2}  # slot 1 is on the GPU of slot 0, which is no place of its own
    assert abs(int((slots == 0).sum()) - 1500) < 200
    offsets = torch.zeros(1, 4, dtype=torch.int32)
    quotas[0, :3] = torch.tensor([2, 0, 0])
    ids = torch.tensor([[0, 3, 1], [0, 2, -1], [0, 1, 1]])
    exact = slots_of(ids, 0, quotas, *placed, offsets=offsets, backend=backend)
    assert exact.tolist() == [[0, -1, 3], [0, 5, -1], [0, 3, 3]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_salt_on_the_device(backend: str) -> None:
    case = drawn(3)
    classes = classify(case.phy2log, case.counts.shape[1], case.topology)
    quotas = split(case.counts, case.phy2log, classes, case.topology)
    ids = torch.randint(case.counts.shape[1], (40, 3))
    placed = quotas, case.phy2log, case.counts.shape[1], case.topology
    want = slots_of(ids, 1, *placed, salt=-9, backend=backend)
    got = slots_of(ids, 1, *placed, salt=torch.tensor([-9], dtype=torch.int32), backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(30))
def test_a_table_repeats_by_quota(seed: int) -> None:
    case = drawn(seed)
    experts, width = case.counts.shape[1], 16
    classes = classify(case.phy2log, experts, case.topology)
    quotas = split(case.counts, case.phy2log, classes, case.topology)
    entries = table(quotas, width, case.phy2log, experts, case.topology, backend="cpu")
    assert torch.equal(entries, table(quotas, width, case.phy2log, experts, case.topology, backend="reference"))
    total = sums(quotas, case.phy2log, experts)
    for layer in range(2):
        for expert, row in enumerate(entries[layer].tolist()):
            if expert not in case.phy2log[layer]:
                assert row == [-1] * width
                continue
            assert row == sorted(row)
            assert set(case.phy2log[layer, row].tolist()) == {expert}
            if total[layer, expert]:
                for slot in (case.phy2log[layer] == expert).nonzero().flatten().tolist():
                    exact = int(quotas[layer, slot]) * width / int(total[layer, expert])
                    assert abs(row.count(slot) - exact) < 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_static_map_is_near_and_fair(nodes: int) -> None:
    random = torch.Generator().manual_seed(nodes)
    topology = Topology(num_replicas=24, num_gpus=8, num_groups=nodes, num_nodes=nodes)
    phy2log = torch.randint(-1, 10, (5, 24), generator=random)
    maps = torch.stack([dispatch_map(rank, phy2log, 10, topology) for rank in range(8)])  # [D, L, E]
    size = 8 // nodes
    for layer in range(5):
        for expert in range(10):
            slots = (phy2log[layer] == expert).nonzero().flatten().tolist()
            chosen = maps[:, layer, expert].tolist()
            if not slots:
                assert chosen == [-1] * 8
                continue
            assert set(chosen) <= set(slots)
            places = sorted({slot // 3 for slot in slots})
            on_node = [[gpu for gpu in places if gpu // size == node] for node in range(nodes)]
            for rank, slot in enumerate(chosen):
                if rank in places:
                    assert slot == min(slot for slot in slots if slot // 3 == rank)
                elif on_node[rank // size]:
                    assert slot // 3 in on_node[rank // size]
            groups = [
                [chosen[r] for r in range(n * size, n * size + size) if r not in places]
                for n in range(nodes)
                if on_node[n]
            ]
            groups.append([chosen[r] for r in range(8) if not on_node[r // size]])
            for group, among in zip(groups, [*filter(None, on_node), places], strict=True):
                shares = sorted(sum(slot // 3 == gpu for slot in group) for gpu in among)
                assert all(b - a <= 1 for a, b in pairwise(shares)), (layer, expert)


def test_refusals() -> None:
    topology = Topology(num_replicas=4, num_gpus=2)
    phy2log, quotas = torch.tensor([[0, 1, 0, 2]]), torch.ones(1, 4, dtype=torch.int32)
    placed = quotas, phy2log, 3, topology
    for ids, layer, message in (
        (torch.tensor([[0, 3]]), 0, r"topk_ids\[0, 1\]=3 must be -1 to 2"),
        (torch.tensor([[0, -2]]), 0, r"topk_ids\[0, 1\]=-2"),
        (torch.tensor([0, 1]), 0, r"must be \[tokens, k\]"),
        (torch.tensor([[0.0]]), 0, "topk_ids has dtype torch.float32"),
        (torch.tensor([[0]]), 1, "layer=1 must be 0 to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            slots_of(ids, layer, *placed)
    with pytest.raises(ValueError, match="offsets has shape"):
        slots_of(torch.tensor([[0]]), 0, *placed, offsets=torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="width=0"):
        table(quotas, 0, phy2log, 3, topology)
    with pytest.raises(ValueError, match="rank=2 must be 0 to 1"):
        dispatch_map(2, phy2log, 3, topology)
