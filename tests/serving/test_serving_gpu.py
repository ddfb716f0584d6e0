"""On a GPU: the reference's integers, without waiting and without allocation, and from a captured graph."""

from __future__ import annotations

import pytest
import torch

from eplb_triton import Topology, plan
from eplb_triton.serving.dispatch import classify, slots_of, slots_workspace, split, split_workspace, table
from eplb_triton.serving.transfers import Transfers, list_transfers
from eplb_triton.serving.window import LoadWindow
from eplb_triton.synthetic import lognormal_series

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

E, TOPOLOGY = 256, Topology(num_replicas=288, num_gpus=32)


def test_a_captured_step_follows_its_ids() -> None:
    series = lognormal_series(2, num_layers=3, tokens_per_step=4096)
    slots = plan(series[0], TOPOLOGY, backend="reference").phy2log.cuda()
    classes = classify(slots, E, TOPOLOGY)
    window = LoadWindow(2, 3, E, "cuda")
    ids = torch.randint(E, (512, 8), device="cuda")
    quotas, found = torch.empty(3, 288, dtype=torch.int32, device="cuda"), torch.empty_like(ids)
    offsets, entries = torch.zeros(3, E, dtype=torch.int32, device="cuda"), torch.empty(3, E, 16, device="cuda").long()
    scratch, rows = split_workspace(3, E, TOPOLOGY, "cuda"), slots_workspace(ids.numel(), E, "cuda")
    counts = torch.zeros(3, E, dtype=torch.int32, device="cuda")

    def step() -> None:
        window.add(1, ids)
        counts.copy_(window.ring[0])
        split(counts, slots, classes, TOPOLOGY, out=quotas, workspace=scratch)
        slots_of(ids, 1, quotas, slots, E, TOPOLOGY, offsets=offsets, out=found, workspace=rows)
        table(quotas, 16, slots, E, TOPOLOGY, out=entries)

    step()  # compiles
    window.ring.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(2):
        window.ring.zero_()
        ids.copy_(torch.randint(E, (512, 8), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        want = torch.bincount(ids.flatten(), minlength=E)
        assert torch.equal(window.history[-1, 1].long(), want)
        on_cpu = slots.cpu(), classes.cpu()
        again = split(window.ring[0].cpu(), *on_cpu, TOPOLOGY, backend="reference")
        assert torch.equal(quotas.cpu(), again)
        exact = slots_of(ids.cpu(), 1, again, on_cpu[0], E, TOPOLOGY, offsets=offsets.cpu(), backend="reference")
        assert torch.equal(found.cpu(), exact)
        assert torch.equal(entries.cpu(), table(again, 16, on_cpu[0], E, TOPOLOGY, backend="reference"))


def test_nothing_is_allocated() -> None:
    series = lognormal_series(1, num_layers=2).int().cuda()[0]
    slots = plan(series, TOPOLOGY, backend="reference").phy2log.cuda()
    classes = classify(slots, E, TOPOLOGY)
    quotas, scratch = torch.empty(2, 288, dtype=torch.int32, device="cuda"), split_workspace(2, E, TOPOLOGY, "cuda")
    window, ids = LoadWindow(4, 2, E, "cuda"), torch.randint(E, (64, 8), device="cuda")
    for attempt in range(2):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        split(series, slots, classes, TOPOLOGY, out=quotas, workspace=scratch)
        window.add(0, ids)
        if attempt:  # the first compiles
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_captured_transfers_follow_the_maps() -> None:
    topology = Topology(num_replicas=288, num_gpus=32, num_nodes=4)
    live, ahead = (torch.randperm(288, device="cuda").expand(3, -1).contiguous() % E for _ in range(2))
    out = Transfers.empty(3, 288, "cuda")
    list_transfers(ahead, live, E, topology, out=out)  # compiles
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    list_transfers(ahead, live, E, topology, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        list_transfers(ahead, live, E, topology, out=out)
    for _ in range(2):
        ahead.copy_(torch.randperm(288, device="cuda") % E)
        graph.replay()
        torch.cuda.synchronize()
        want = list_transfers(ahead.cpu(), live.cpu(), E, topology, backend="reference")
        assert all(torch.equal(mine.cpu(), its) for mine, its in zip(out.tensors, want.tensors, strict=True))
