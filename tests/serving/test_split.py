"""What a split is, shown without the oracle; then that the backends agree on more than was recorded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from eplb_triton import Topology, plan
from eplb_triton.serving.dispatch import classify, split, split_bound, table
from eplb_triton.synthetic import lognormal_series
from tests.backends import CPU_BACKENDS
from tests.serving.shares import Drawn, drawn, gpu_loads, sums

MOST = 2**31 - 1


def _split(case: Drawn, rounds: int, backend: str = "cpu") -> Tensor:
    classes = classify(case.phy2log, case.counts.shape[1], case.topology, backend=backend)
    return split(case.counts, case.phy2log, classes, case.topology, rounds=rounds, backend=backend)


@pytest.mark.parametrize("seed", range(60))
def test_quotas_are_the_tokens(seed: int) -> None:
    case = drawn(seed)
    for rounds in (0, 1, 8):
        quotas = _split(case, rounds)
        assert quotas.dtype == torch.int32
        assert (quotas >= 0).all()
        assert (quotas[case.phy2log < 0] == 0).all()
        assert torch.equal(sums(quotas, case.phy2log, case.counts.shape[1]), case.counts)
        slots = torch.arange(case.topology.num_replicas) // case.topology.slots_per_gpu
        for layer in range(len(quotas)):  # at most one slot of an expert on a GPU gets tokens: the lowest
            seen = set()
            for slot, (gpu, expert) in enumerate(zip(slots.tolist(), case.phy2log[layer].tolist(), strict=True)):
                assert (gpu, expert) not in seen or int(quotas[layer, slot]) == 0
                seen.add((gpu, expert))


@pytest.mark.parametrize("seed", range(60))
def test_the_busiest_gpu_never_gets_busier(seed: int) -> None:
    case = drawn(seed)
    peaks = [gpu_loads(_split(case, rounds), case.topology).amax(1) for rounds in (0, 1, 2, 4, 8, 64)]
    for before, after in pairwise(peaks):
        assert (after <= before).all()


@pytest.mark.parametrize("seed", range(60))
def test_classes_share_no_gpu_and_are_as_low_as_can_be(seed: int) -> None:
    case = drawn(seed)
    classes = classify(case.phy2log, case.counts.shape[1], case.topology, backend="cpu")
    for layer, slots in enumerate(case.phy2log.view(len(classes), case.topology.num_gpus, -1)):
        gpus = [set((slots == expert).any(1).nonzero().flatten().tolist()) for expert in range(classes.shape[1])]
        for expert, own in enumerate(gpus):
            number = int(classes[layer, expert])
            assert (number >= 0) == (len(own) > 1)
            lower = [e for e in range(expert) if int(classes[layer, e]) >= 0]
            assert not any(gpus[e] & own for e in lower if int(classes[layer, e]) == number)
            for other in range(number):
                assert any(gpus[e] & own for e in lower if int(classes[layer, e]) == other)


def test_64_rounds_are_within_a_token_a_place_of_the_optimum() -> None:
    worst = 0.0
    for seed in range(150):
        case = drawn(1000 + seed, gaps=False)  # two layers each: 300 instances
        peak = gpu_loads(_split(case, 64), case.topology).amax(1)
        bound = split_bound(case.counts, case.phy2log, case.topology)
        for layer, slots in enumerate(case.phy2log.view(2, case.topology.num_gpus, -1)):
            held = torch.zeros(case.topology.num_gpus, case.counts.shape[1], dtype=torch.bool)
            most_places = int(held.scatter_(1, slots, True).sum(0).max())
            excess = float(peak[layer]) - float(bound[layer])
            assert -1e-6 * float(peak[layer]) <= excess <= most_places, (seed, layer)
            worst = max(worst, excess / most_places)
    assert worst > 0  # else nothing was tested


def test_eight_rounds_of_deepseek_v3_are_near_the_optimum() -> None:
    topology = Topology(num_replicas=288, num_gpus=32)
    series = lognormal_series(2, num_layers=6, tokens_per_step=4096)
    placement = plan(series[0], topology)
    classes = classify(placement.phy2log, 256, topology)
    bound = split_bound(series[1], placement.phy2log, topology).sum()
    gaps = []
    for rounds in (0, 1, 4, 8):
        quotas = split(series[1], placement.phy2log, classes, topology, rounds=rounds)
        gaps.append(float(gpu_loads(quotas, topology).amax(1).sum() / bound - 1))
    assert gaps[0] > 0.03
    assert gaps[1] < 0.026
    assert gaps[3] < 0.003


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_sums_up_to_the_most(backend: str) -> None:
    phy2log = torch.tensor([[0, 1, 0, 2, 0, 1], [0, 0, 0, 0, 1, 2]])
    topology = Topology(num_replicas=6, num_gpus=3)
    counts = torch.tensor([[MOST - 2, 1, 1], [MOST, 0, 0]])
    classes = classify(phy2log, 3, topology, backend=backend)
    quotas = split(counts, phy2log, classes, topology, backend=backend)
    assert torch.equal(sums(quotas, phy2log, 3), counts)
    peak = gpu_loads(quotas, topology).amax(1)
    assert peak.tolist() == [MOST // 3 + 1, MOST // 2 + 1]
    assert (table(quotas, 7, phy2log, 3, topology, backend=backend) >= 0).all()
    with pytest.raises(ValueError, match=r"counts\[0\] sums to 2147483648"):
        split(counts + torch.tensor([[1, 0, 0], [0, 0, 0]]), phy2log, classes, topology, backend=backend)


@pytest.mark.parametrize("seed", range(12))
def test_backends_agree(seed: int) -> None:
    case = drawn(500 + seed)
    want = _split(case, 8, "reference")
    assert torch.equal(_split(case, 8, "cpu"), want)
    loads = case.counts.double() * 1.7e-9
    narrow = case._replace(phy2log=case.phy2log.int(), counts=loads)
    assert torch.equal(_split(narrow, 8, "cpu"), _split(narrow, 8, "reference"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float_loads_become_whole(backend: str) -> None:
    phy2log = torch.tensor([[0, 1, 0, 2]] * 3)
    topology = Topology(num_replicas=4, num_gpus=2)
    loads = torch.tensor([[3.0, 1.5, 0.0], [1e-42, 2.0**-149, 0.0], [0.0, 0.0, 0.0]])
    classes = classify(phy2log, 3, topology, backend=backend)
    quotas = split(loads, phy2log, classes, topology, backend=backend)
    whole = sums(quotas, phy2log, 3)
    scale = [23 - 2 - 1, 23 - 2 + 140, 0]  # the largest is in [2^1, 2^2), then in [2^-140, 2^-139)
    want = [[int(load * 2.0**s) for load in row] for row, s in zip(loads.double().tolist(), scale, strict=True)]
    assert whole.tolist() == want
    assert (whole.sum(1) < 2**24).all()


def test_refusals() -> None:
    topology = Topology(num_replicas=4, num_gpus=2)
    phy2log, classes = torch.tensor([[0, 1, 0, -1]]), torch.tensor([[0, -1, -1]], dtype=torch.int32)
    for counts, message in (
        (torch.tensor([[1, -1, 0]]), r"counts\[0, 1\]=-1 must be at least 0"),
        (torch.tensor([[1.0, float("nan"), 0]]), r"counts\[0, 1\]=nan"),
        (torch.tensor([[1, 2, 3]]), r"counts\[0, 2\]=3 must be 0, for no slot"),
        (torch.tensor([1, 2, 3]), r"counts has shape \(3,\), must be \(1, 3\)"),
        (torch.tensor([[[1, 2, 0]]]), r"rank=None must be 0 to 0"),
        (torch.tensor([[True, False, False]]), "counts has dtype torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            split(counts, phy2log, classes, topology)
    good = torch.tensor([[4, 2, 0]])
    for arguments, message in (
        ({"rounds": -1}, "rounds=-1"),
        ({"rank": 0}, "go together"),
        ({"out": torch.empty(1, 4)}, "out has dtype torch.float32, must be torch.int32"),
        ({"out": torch.empty(1, 8, dtype=torch.int32)[:, ::2]}, "must be contiguous"),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
        ({"backend": "cpu", "workspace": torch.empty(1)}, "workspace goes with backend='triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            split(good, phy2log, classes, topology, **arguments)
    with pytest.raises(ValueError, match="phy2log has shape"):
        classify(torch.zeros(1, 5, dtype=torch.int64), 3, topology)
