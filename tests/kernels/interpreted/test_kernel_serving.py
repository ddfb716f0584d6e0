"""The kernels of a serving step in the interpreter: recorded splits, and the reference's integers where none are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eplb_triton import Topology
from eplb_triton.serving.dispatch import classify, slots_of, slots_workspace, split, split_workspace, table
from eplb_triton.serving.transfers import Transfers, list_transfers
from eplb_triton.serving.window import LoadWindow
from tests.serving.moves import drawn_pair, skewed_pair
from tests.serving.shares import drawn, golden_shares, sums
from tests.sizes import full_unless

GOLDEN = {case.name: case for case in golden_shares()}
CHOSEN = ("1", "6", "7", "11", "34")
"""Few slots, dozens of replicas, DeepSeek-V3, one GPU, one slot a GPU; most with ids."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=full_unless(name in CHOSEN)) for name in GOLDEN])
def test_recorded(name: str) -> None:
    case = GOLDEN[name]
    classes = classify(case.phy2log, case.experts, case.topology, backend="triton")
    assert torch.equal(classes[0].long(), case.arrays["classes"])
    workspace = split_workspace(1, case.experts, case.topology, "cpu")
    quotas = torch.empty(1, case.topology.num_replicas, dtype=torch.int32)
    for rounds in (0, 1, 4, 8):
        for poisoned in (workspace, quotas):
            poisoned.fill_(-0x55555556)
        split(
            case.counts, case.phy2log, classes, case.topology, rounds=rounds, backend="triton", out=quotas,
            workspace=workspace,
        )  # fmt: skip
        assert torch.equal(quotas[0].long(), case.arrays[f"quota{rounds}"]), rounds
        if rounds == 4:
            entries = table(quotas, 16, case.phy2log, case.experts, case.topology, backend="triton")
            assert torch.equal(entries[0], case.arrays["table16"])
    if "ids" in case.arrays:
        _check_slots(name)


def _check_slots(name: str) -> None:
    case = GOLDEN[name]
    ids = case.arrays["ids"]
    counts = torch.stack([torch.bincount(rank[rank >= 0], minlength=case.experts) for rank in ids]).unsqueeze(1)
    classes = classify(case.phy2log, case.experts, case.topology, backend="triton")
    placed = case.phy2log, case.experts, case.topology
    offsets = torch.full((1, case.experts), -7, dtype=torch.int32)
    quotas = split(counts, case.phy2log, classes, case.topology, rank=1, offsets=offsets, backend="triton")
    assert torch.equal(offsets[0].long(), counts[0, 0])
    workspace = slots_workspace(ids[1].numel(), case.experts, "cpu").fill_(-7)
    exact = slots_of(ids[1], 0, quotas, *placed, offsets=offsets, backend="triton", workspace=workspace)
    assert torch.equal(exact, case.arrays["slots_exact"][1])
    stacked = quotas.expand(8, -1).contiguous(), case.phy2log.expand(8, -1).contiguous()
    for salt in (1, torch.tensor([1], dtype=torch.int32)):
        hashed = slots_of(ids[1].int(), 7, *stacked, *placed[1:], salt=salt, backend="triton")
        assert torch.equal(hashed.long(), case.arrays["slots_hashed"][1])


@pytest.mark.parametrize("seed", range(6))
def test_gaps_and_doubled_replicas(seed: int) -> None:
    """As the reference, of placements that were not recorded; float loads, bad ones among them, and idle experts."""
    case = drawn(300 + seed)
    experts = case.counts.shape[1]
    classes = classify(case.phy2log, experts, case.topology, backend="triton")
    assert torch.equal(classes, classify(case.phy2log, experts, case.topology, backend="reference"))
    loads = case.counts.float() * 0.37
    for counts in (case.counts, loads):
        want = split(counts, case.phy2log, classes, case.topology, backend="reference")
        assert torch.equal(split(counts, case.phy2log, classes, case.topology, backend="triton"), want)
    bad = loads.clone()
    bad[0, 0] = float("nan")
    loads[0, 0] = 0
    want = split(loads, case.phy2log, classes, case.topology, backend="reference")
    assert torch.equal(split(bad, case.phy2log, classes, case.topology, backend="triton"), want)
    placed = want, case.phy2log.int(), experts, case.topology
    got = table(want, 5, *placed[1:], backend="triton")
    assert torch.equal(got, table(want, 5, *placed[1:], backend="reference"))
    ids = torch.randint(-1, experts, (30, 3), generator=torch.Generator().manual_seed(seed))
    for offsets in (None, torch.arange(2 * experts).int().view(2, experts)):
        slots = slots_of(ids, 1, *placed, offsets=offsets, salt=-seed, backend="triton")
        assert torch.equal(slots, slots_of(ids, 1, *placed, offsets=offsets, salt=-seed, backend="reference"))


def test_sums_up_to_the_most() -> None:
    phy2log = torch.tensor([[0, 1, 0, 2, 0, 1], [0, 0, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2]])
    topology, most = Topology(num_replicas=6, num_gpus=3), 2**31 - 1
    counts = torch.tensor([[most - 2, 1, 1], [most, 0, 0], [most // 3, most // 3, most // 3 + 1]])
    classes = classify(phy2log, 3, topology, backend="triton")
    quotas = split(counts, phy2log, classes, topology, backend="triton")
    assert torch.equal(sums(quotas, phy2log, 3), counts)
    assert torch.equal(quotas, split(counts, phy2log, classes, topology, backend="reference"))
    got = table(quotas, 1000, phy2log, 3, topology, backend="triton")
    assert torch.equal(got, table(quotas, 1000, phy2log, 3, topology, backend="reference"))
    ids = torch.arange(3).repeat(200, 1)
    for layer in range(3):
        placed = layer, quotas, phy2log, 3, topology
        assert torch.equal(slots_of(ids, *placed, backend="triton"), slots_of(ids, *placed, backend="reference"))


def test_windows_count_alike() -> None:
    """The ring is as PyTorch's, and an overflow is told."""
    windows = [LoadWindow(3, 2, 40, backend=backend) for backend in ("triton", "cpu")]
    random = torch.Generator().manual_seed(1)
    placement = SimpleNamespace(phy2log=torch.randint(-1, 40, (2, 50), generator=random))
    for _ in range(4):
        ids = torch.randint(-1, 41, (300, 4), generator=random)
        tokens = torch.randint(0, 9, (2, 50), generator=random)
        for window in windows:
            window.advance()
            window.add(1, ids)
            window.add_counts(tokens, placement)
    assert torch.equal(windows[0].history, windows[1].history)
    windows[0].raise_if_bad()
    one_slot = SimpleNamespace(phy2log=torch.zeros(2, 1, dtype=torch.int64))
    windows[0].add_counts(torch.full((2, 1), 2**31 - 1), one_slot)
    with pytest.raises(OverflowError):
        windows[0].raise_if_bad()


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=full_unless(seed in (2, 5, 10))) for seed in range(30)])
def test_transfers(seed: int) -> None:
    """As the reference's, of 32-bit maps too, and where GPU 0 alone holds anything: 126 batches."""
    pair = skewed_pair() if seed == 0 else drawn_pair(500 + seed)
    want = list_transfers(*pair, backend="reference")
    out = Transfers(*(torch.full_like(tensor, -77) for tensor in want.tensors))
    for dtype in (torch.int64, torch.int32):
        maps = pair.ahead.to(dtype), pair.live.to(dtype)
        list_transfers(*maps, pair.experts, pair.topology, backend="triton", out=out)
        for mine, its in zip(out.tensors, want.tensors, strict=True):
            assert torch.equal(mine, its)
            mine.fill_(-77)


def test_transfers_of_what_is_no_expert() -> None:
    """On a GPU nothing is refused: it counts as -1."""
    pair = drawn_pair(502)
    odd = torch.rand(2, *pair.live.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    junk = torch.where(torch.arange(pair.live.shape[1]) % 2 == 0, pair.experts, -9)
    ahead, live = torch.where(odd[0], junk, pair.ahead), torch.where(odd[1], junk, pair.live)
    found = list_transfers(ahead, live, pair.experts, pair.topology, backend="triton")
    ahead, live = pair.ahead.masked_fill(odd[0], -1), pair.live.masked_fill(odd[1], -1)
    want = list_transfers(ahead, live, pair.experts, pair.topology, backend="reference")
    assert all(torch.equal(mine, its) for mine, its in zip(found.tensors, want.tensors, strict=True))
