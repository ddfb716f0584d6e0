"""Transfers: what they are, said without the reference; and every backend's are the reference's."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Topology, plan
from eplb_triton.serving.transfers import COUNTS, Transfers, list_transfers
from eplb_triton.synthetic import lognormal_series
from tests.backends import CPU_BACKENDS
from tests.serving.moves import Pair, drawn_pair, skewed_pair
from tests.stages.fourth import transfers as fourth

PAIRS = [*(drawn_pair(seed) for seed in range(12)), skewed_pair()]


def check_rules(pair: Pair, made: Transfers) -> None:
    """Every rule of a transfer, slot by slot."""
    size = pair.topology.num_replicas // pair.topology.num_gpus
    for layer, (after, before) in enumerate(zip(pair.ahead.tolist(), pair.live.tolist(), strict=True)):
        sent = [0] * pair.topology.num_gpus
        busy: dict[int, set[int]] = {}
        copied = fetched = afar = missing = 0
        for slot, expert in enumerate(after):
            source, batch = int(made.source[layer, slot]), int(made.batch[layer, slot])
            holders = [place for place, held in enumerate(before) if held == expert]
            taker = slot // size
            if expert in (-1, before[slot]):
                assert (source, batch) == (slot, -1)
            elif not holders:
                assert (source, batch) == (-1, -1)
                missing += 1
            elif any(place // size == taker for place in holders):
                assert source == min(place for place in holders if place // size == taker)
                assert batch == -1
                copied += 1
            else:
                near = [place for place in holders if pair.node(place) == pair.node(slot)] or holders
                least = min(sent[place // size] for place in near)
                assert source == min(place for place in near if sent[place // size] == least)
                giver = source // size
                sent[giver] += 1
                pairs = {giver, taker}
                assert all(busy[number] & pairs for number in range(batch))
                assert not busy.get(batch, set()) & pairs
                busy.setdefault(batch, set()).update(pairs)
                fetched += 1
                afar += pair.node(source) != pair.node(slot)
        assert made.counts[layer].tolist() == [copied, fetched, afar, missing, len(busy)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_what_transfers_are(number: int, backend: str) -> None:
    pair = PAIRS[number]
    check_rules(pair, list_transfers(*pair, backend=backend))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_same_as_the_reference(dtype: torch.dtype) -> None:
    for seed in range(60):
        pair = drawn_pair(100 + seed, layers=3)
        maps = pair.ahead.to(dtype), pair.live.to(dtype)
        want = list_transfers(*pair, backend="reference")
        out = Transfers(*(torch.full_like(tensor, -77) for tensor in want.tensors))
        made = list_transfers(*maps, pair.experts, pair.topology, backend="cpu", out=out)
        assert made is out
        assert all(torch.equal(mine, its) for mine, its in zip(out.tensors, want.tensors, strict=True))


def test_the_specification_suffices() -> None:
    for pair in PAIRS:
        want = list_transfers(*pair, backend="reference")
        for layer, (after, before) in enumerate(zip(pair.ahead.numpy(), pair.live.numpy(), strict=True)):
            source, batch = fourth.transfers(after, before, pair.topology)
            assert source == want.source[layer].tolist()
            assert batch == want.batch[layer].tolist()


def test_of_a_placement() -> None:
    """What a plan moves is what its transfers bring; a weight that follows them stands where the map says."""
    topology = Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2)
    series = lognormal_series(2, num_layers=4, num_experts=64, drift=0.5)
    live, ahead = (plan(loads, topology, backend="reference") for loads in series)
    todo = ahead.transfers(live)
    moved = ahead.moved(live)
    counts = dict(zip(COUNTS, todo.counts.T, strict=True))
    assert torch.equal(counts["copied"] + counts["fetched"], moved.slots)
    assert torch.equal(counts["fetched"], moved.fetches)  # no GPU holds an expert twice
    assert torch.equal(live.phy2log.gather(1, todo.source.long()), ahead.phy2log)
    assert todo.total() == {name: int(column.sum()) for name, column in counts.items()}
    assert torch.equal(todo.of(2).source, todo.source[2:3])
    todo.raise_if_missing()
    nothing = live.transfers(live)
    assert nothing.total() == dict.fromkeys(COUNTS, 0)
    assert torch.equal(nothing.source, torch.arange(80, dtype=torch.int32).expand(4, -1))


def test_an_expert_that_nobody_holds() -> None:
    topology = Topology(num_replicas=4, num_gpus=2)
    live = Placement.from_phy2log(torch.tensor([[0, 1, 2, 1], [0, 1, -1, -1]]), 3, topology)
    ahead = Placement.from_phy2log(torch.tensor([[0, 1, 2, 1], [2, 0, 1, 2]]), 3, topology)
    todo = ahead.transfers(live)
    assert todo.source.tolist() == [[0, 1, 2, 3], [-1, 0, 1, -1]]
    assert todo.batch.tolist() == [[-1, -1, -1, -1], [-1, -1, 0, -1]]
    assert todo.counts.tolist() == [[0, 0, 0, 0, 0], [1, 1, 0, 2, 1]]
    with pytest.raises(ValueError, match="layer 1, slot 0: no slot of the placement in force holds its expert"):
        todo.raise_if_missing()


MAP, TOPOLOGY = torch.zeros(2, 6, dtype=torch.int64), Topology(num_replicas=6, num_gpus=3)


@pytest.mark.parametrize(
    ("ahead", "live", "message"),
    [
        (MAP[:, :5], MAP, r"phy2log has shape \(2, 5\), must be \[layers, num_replicas=6\]"),
        (MAP, MAP[:1], r"live has shape \(1, 6\), must be \(2, 6\)"),
        (MAP, MAP.int(), r"live has dtype torch.int32, must be torch.int64; use .to\(\)"),
        (MAP, MAP - 2, r"live\[0, 0\]=-2 must be -1 to 0"),
        (MAP + 1, MAP, r"ahead\[0, 0\]=1 must be -1 to 0"),
    ],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_refusals(backend: str, ahead: Tensor, live: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_transfers(ahead, live, 1, TOPOLOGY, backend=backend)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"out.counts has shape \(3, 5\), must be \(2, 5\)"):
        list_transfers(MAP, MAP, 1, TOPOLOGY, out=Transfers(MAP.int(), MAP.int(), torch.zeros(3, 5).int()))


def test_more_slots_than_a_key_of_the_kernel_has_room_for() -> None:
    pytest.importorskip("triton")
    slots = torch.zeros(1, 20_000, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_replicas=20000 must be at most 16384 for backend 'triton'"):
        list_transfers(slots, slots, 1, Topology(num_replicas=20_000, num_gpus=4), backend="triton")


def test_no_layers() -> None:
    for backend in CPU_BACKENDS:
        assert list_transfers(MAP[:0], MAP[:0], 1, TOPOLOGY, backend=backend).counts.shape == (0, 5)


def test_milliseconds_of_one_core() -> None:
    """58 layers of DeepSeek-V3 of which 83 % of the slots move: 0.8 ms of processor time where this was written."""
    topology, random = Topology(num_replicas=288, num_gpus=32, num_nodes=4), np.random.default_rng(0)
    live = np.stack([random.permutation(288) % 256 for _ in range(58)])
    ahead = live.copy()
    for row in ahead:
        moved = random.permutation(288)[:240]
        row[moved] = row[random.permutation(moved)]
    maps, out = (torch.from_numpy(ahead), torch.from_numpy(live)), Transfers.empty(58, 288)
    seconds = []
    for _ in range(6):  # the first one compiles
        began = time.process_time()
        list_transfers(*maps, 256, topology, backend="cpu", out=out)
        seconds.append(time.process_time() - began)
    assert 0.8 < (ahead != live).mean() < 0.84
    assert min(seconds) < 5e-3


def test_few_batches_at_the_size_of_deepseek_v3() -> None:
    """First fit needs fewer than twice the transfers of the busiest GPU, of which no schedule needs fewer than one
    batch each."""
    random = np.random.default_rng(0)
    live, ahead = (torch.from_numpy(np.stack([random.permutation(288) % 256 for _ in range(2)])) for _ in range(2))
    made = list_transfers(ahead, live, 256, Topology(num_replicas=288, num_gpus=32, num_nodes=4))
    assert torch.equal(live.gather(1, made.source.long()), ahead)
    for layer in range(2):
        slots = (made.batch[layer] >= 0).nonzero().flatten()
        gpus = torch.cat((slots, made.source[layer, slots])) // 9
        busiest = int(torch.bincount(gpus).max())
        assert busiest <= int(made.counts[layer, 4]) < 2 * busiest
