"""What one asks of a placement, on placements small enough to check by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Topology, plan

TOPOLOGY = Topology(num_replicas=6, num_gpus=3)
GROUPED = Topology(num_replicas=6, num_gpus=2, num_groups=2, num_nodes=2)


def placed(*layers: list[int], topology: Topology = TOPOLOGY, experts: int = 4) -> Placement:
    return Placement.from_phy2log(torch.tensor(layers), experts, topology)


def test_from_phy2log_ranks_in_slot_order() -> None:
    placement = placed([0, 1, 2, 0, 3, 0], [3, 2, 1, 0, 3, 2])
    assert placement.phyrank.tolist() == [[0, 0, 0, 1, 0, 2], [0, 0, 0, 0, 1, 1]]
    assert placement.logcnt.tolist() == [[3, 1, 1, 1], [1, 1, 2, 2]]
    assert placement.slots_of_experts().tolist()[0] == [[0, 3, 5], [1, -1, -1], [2, -1, -1], [4, -1, -1]]
    placement.validate()


def test_log2phy_is_in_rank_order_not_slot_order() -> None:
    placement = placed([0, 1, 2, 0, 3, 0])
    turned = dataclasses.replace(placement, phyrank=torch.tensor([[2, 0, 0, 0, 0, 1]]))
    turned.validate()
    assert turned.slots_of_experts()[0, 0].tolist() == [3, 5, 0]


def test_log2phy_is_there_where_asked_for() -> None:
    assert plan(torch.rand(2, 4), TOPOLOGY).log2phy is None
    placement = plan(torch.rand(2, 4), TOPOLOGY, log2phy=True)
    assert placement.log2phy is not None
    assert placement.log2phy.equal(placement.slots_of_experts())
    narrow = Placement.from_phy2log(torch.tensor([[0, 1, 2, 0, 3, 0]]), 4, TOPOLOGY, log2phy=2)
    assert narrow.log2phy is not None
    assert narrow.log2phy.tolist() == [[[0, 3], [1, -1], [2, -1], [4, -1]]]
    assert narrow.bad is not None
    assert narrow.bad.tolist() == [[-2]]
    with pytest.raises(ValueError, match="log2phy has room for 2 replicas of an expert, must have for 3"):
        narrow.raise_if_bad()


def test_slots_without_an_expert() -> None:
    partial = placed([0, 1, 2, -1, 3, -1], [0, 1, 2, 3, 0, 1])
    assert partial.partial
    assert partial.phyrank.tolist()[0] == [0, 0, 0, -1, 0, -1]
    assert partial.logcnt.tolist()[0] == [1, 1, 1, 1]
    assert partial.slots_of_experts().tolist()[0][0] == [0, -1, -1]
    full = placed([0, 1, 2, 3, 3, 2], [0, 1, 2, 3, 0, 1])
    assert full.moved(partial).slots.tolist() == [2, 0]
    assert full.moved(partial).fetches.tolist() == [2, 0]
    assert partial.duplicates().tolist() == [0, 0]
    with pytest.raises(ValueError, match="layer 0, slot 3 holds no expert, must hold one for loads of GPUs"):
        partial.gpu_loads(torch.ones(2, 4))
    with pytest.raises(ValueError, match="layer 0: expert 3 has no replica, must have one for loads of GPUs"):
        placed([0, 1, 2, 0, 1, 2]).gpu_loads(torch.ones(1, 4))
    with pytest.raises(ValueError, match="layer 0, slot 3: phy2log names expert -1, must be 0 to 3"):
        partial.validate()


def test_bad_loads_are_never_judged_balanced() -> None:
    placement = placed([0, 1, 2, 0, 3, 0])
    for load in (torch.nan, -1.0, torch.inf):
        loads = torch.tensor([[30.0, 1.0, load, 3.0]])
        for judge in (placement.gpu_loads, placement.balancedness, placement.gap):
            with pytest.raises(ValueError, match=r"loads\[0, 2\]=.* must be a finite load of at least 0"):
                judge(loads)


def test_maps_of_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"phy2log has dtype torch.float32, must be torch.int64 or torch.int32"):
        Placement.from_phy2log(torch.tensor([[0.5, 1, 2, 0, 3, 0]]), 4, TOPOLOGY)
    with pytest.raises(ValueError, match=r"logcnt has dtype torch.float32, must be torch.int64 or torch.int32"):
        dataclasses.replace(placed([0, 1, 2, 0, 3, 0]), logcnt=torch.ones(1, 4)).validate()


def test_spread_in_order() -> None:
    placement = Placement.spread_in_order(2, 4, TOPOLOGY)
    assert placement.phy2log.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert placement.policy == "in order"


def test_gpu_loads_and_balancedness() -> None:
    placement = placed([0, 1, 2, 0, 3, 0], [0, 1, 2, 0, 3, 0])
    weight = torch.tensor([[30, 1, 2, 3], [3, 9, 0, 0]])
    loads = placement.gpu_loads(weight)
    assert loads.tolist() == [[11.0, 12.0, 13.0], [10.0, 1.0, 1.0]]
    assert loads.dtype == torch.float64
    assert placement.balancedness(weight) == (12 + 4) / (13 + 10)
    assert placement.balancedness(weight, per_layer=True).tolist() == [12 / 13, 4 / 10]


def test_idle_layers_are_balanced() -> None:
    placement = placed([0, 1, 2, 0, 3, 0])
    assert placement.balancedness(torch.zeros(1, 4)) == 1.0
    assert placement.balancedness(torch.zeros(1, 4), per_layer=True).tolist() == [1.0]


def test_gpu_loads_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"loads has shape \(2, 4\), must be \[layers, experts\] = \(1, 4\)"):
        placed([0, 1, 2, 0, 3, 0]).gpu_loads(torch.zeros(2, 4))


def test_moved_counts_slots_and_fetches() -> None:
    before = placed([0, 1, 2, 0, 3, 0], [0, 1, 2, 3, 0, 1])
    after = placed([1, 0, 2, 0, 0, 3], [2, 2, 2, 3, 1, 0])
    slots, fetches = after.moved(before)
    assert slots.tolist() == [4, 4]  # layer 0 only reorders slots on their own GPUs
    assert fetches.tolist() == [0, 1]  # GPU 0 fetches expert 2, once for both slots
    assert [count.tolist() for count in before.moved(before)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (placed([0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]), "previous has 2 layers, must have 1"),
        (placed([0, 1, 2, 3, 4, 0], experts=5), "previous has 5 experts, must have 4"),
        (placed([0, 1, 2, 3, 0, 1], topology=Topology(num_replicas=6, num_gpus=2)), "previous has 2 GPUs, must have 3"),
        (
            placed([0, 1, 2, 3, 0, 1, 2, 3, 0], topology=Topology(num_replicas=9, num_gpus=3)),
            "previous has 9 replicas, must have 6",
        ),
    ],
)
def test_moved_between_unlike_placements(other: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placed([0, 1, 2, 0, 3, 0]).moved(other)


def test_duplicates_counts_every_replica_that_shares() -> None:
    assert placed([0, 0, 1, 2, 3, 3], [0, 1, 0, 2, 0, 3]).duplicates().tolist() == [4, 0]
    two = Topology(num_replicas=6, num_gpus=2)
    assert placed([0, 0, 0, 1, 2, 3], topology=two).duplicates().tolist() == [3]


def test_fingerprint_is_the_same_everywhere() -> None:
    placement = placed([0, 1, 2, 0, 3, 0])
    assert placement.fingerprint() == "5157b89bed52e3f1"
    narrow = dataclasses.replace(placement, phy2log=placement.phy2log.to(torch.int32))
    assert narrow.fingerprint() == placement.fingerprint()
    strided = dataclasses.replace(placement, phyrank=torch.stack([placement.phyrank] * 2, 2)[:, :, 0])
    assert strided.fingerprint() == placement.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        placed([1, 0, 2, 0, 3, 0]),
        placed([0, 1, 2, 0, 3, 0], topology=Topology(num_replicas=6, num_gpus=2)),
        dataclasses.replace(placed([0, 1, 2, 0, 3, 0]), phyrank=torch.tensor([[2, 0, 0, 1, 0, 0]])),
        placed([0, 1, 2, 0, 3, 0], [0, 1, 2, 0, 3, 0]),
    ],
)
def test_fingerprint_tells_placements_apart(other: Placement) -> None:
    assert other.fingerprint() != placed([0, 1, 2, 0, 3, 0]).fingerprint()


GOOD = [0, 1, 2, 0, 3, 0]


def broken(**maps: Tensor) -> Placement:
    return dataclasses.replace(placed(GOOD, GOOD), **maps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            broken(phy2log=torch.tensor([GOOD, [0, 1, 2, 0, 4, 0]])),
            "layer 1, slot 4: phy2log names expert 4, must be 0",
        ),
        (broken(phy2log=torch.tensor([GOOD, [0, -1, 2, 0, 3, 0]])), "layer 1, slot 1: phy2log names expert -1"),
        (broken(phy2log=torch.tensor([GOOD, [0, 1, 2, 0, 0, 0]])), "layer 1: expert 3 has no replica"),
        (
            broken(logcnt=torch.tensor([[3, 1, 1, 1], [2, 2, 1, 1]])),
            "layer 1: expert 0 fills 3 slots, but logcnt says 2",
        ),
        (
            broken(phyrank=torch.tensor([[0, 0, 0, 1, 0, 2], [0, 0, 0, 3, 0, 2]])),
            "layer 1, slot 3: phyrank 3 must be at least 0 and below the 3 replicas of its expert 0",
        ),
        (
            broken(phyrank=torch.tensor([[0, 0, 0, 1, 0, 2], [0, 0, 0, 2, 0, 2]])),
            "layer 1, slot 5: replica 2 of expert 0 is in an earlier slot too",
        ),
        (broken(phy2log=torch.tensor([[*GOOD, 0, 0], [*GOOD, 0, 0]])), r"phy2log has shape \(2, 8\), must be"),
        (broken(logcnt=torch.tensor([[3, 1, 1, 1]])), "logcnt has 1 layers, must have 2 like phy2log"),
        (
            placed([0, 1, 0, 2, 3, 2], [0, 1, 2, 3, 3, 0], topology=GROUPED),
            "layer 1, slot 2: expert 2 of group 1 is on node 0, but|layer 1, slot 3: expert 3 of group 1 is on node 1",
        ),
    ],
)
def test_validate_names_the_first_broken_rule(placement: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placement.validate()


def test_from_phy2log_refuses_what_is_no_map() -> None:
    with pytest.raises(ValueError, match=r"phy2log has shape \(1, 5\), must be \[layers, num_replicas=6\]"):
        placed([0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match="layer 0, slot 2: phy2log names expert 9, must be -1 to 3"):
        placed([0, 1, 9, 3, 0, 1])
