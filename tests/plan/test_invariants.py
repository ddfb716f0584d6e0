"""What a plan is, whatever the loads: written without the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_triton import POLICIES, Placement, Topology, plan
from tests.backends import CPU_BACKENDS
from tests.cases import FAMILIES, Shape, loads, shapes

pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)


def assert_is_a_plan(placement: Placement, experts: int) -> None:
    """Every invariant, slot by slot in plain Python."""
    topology = placement.topology
    group_size = experts // topology.planned_groups
    for phy2log, log2phy, logcnt in zip(
        placement.phy2log.tolist(), placement.slots_of_experts().tolist(), placement.logcnt.tolist(), strict=True
    ):
        assert len(phy2log) == topology.num_replicas == sum(logcnt)
        assert len(logcnt) == experts
        for expert in range(experts):
            count, slots = logcnt[expert], log2phy[expert]
            assert count >= 1
            assert sorted(slots[:count]) == [slot for slot, held in enumerate(phy2log) if held == expert]
            assert set(slots[count:]) <= {-1}
            assert len(slots) == topology.num_replicas - experts + 1
        node_of_group: dict[int, int] = {}
        for slot, expert in enumerate(phy2log):
            node = slot // (topology.num_replicas // topology.planned_nodes)
            assert node_of_group.setdefault(expert // group_size, node) == node
    assert placement.phy2log.dtype == placement.logcnt.dtype == torch.int64


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(),
    family=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]),
)
def test_every_plan_is_valid(
    backend: str, policy: str, shape: Shape, family: str, seed: int, layers: int, dtype: torch.dtype
) -> None:
    weight = loads(family, seed, layers, shape.experts)
    if dtype in (torch.float16, torch.int64):  # 1e30 overflows them
        weight = weight.clamp(max=6e4)
    placement = plan(weight.to(dtype), shape.topology, policy=policy, backend=backend)
    assert_is_a_plan(placement, shape.experts)
    placement.validate()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 5), min_size=12, max_size=12), min_size=1, max_size=3))
def test_every_plan_of_small_integers_is_valid(backend: str, policy: str, rows: list[list[int]]) -> None:
    for topology in (
        Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2),
        Topology(num_replicas=12, num_gpus=4),
        Topology(num_replicas=24, num_gpus=6, num_groups=3, num_nodes=3),
        Topology(num_replicas=48, num_gpus=4),
    ):
        assert_is_a_plan(plan(torch.tensor(rows), topology, policy=policy, backend=backend), 12)


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32 - 1))
def test_dhondt_counts_leave_no_envy(backend: str, shape: Shape, family: str, seed: int) -> None:
    """Every replica went to the expert that needed it most: taking it back leaves a load no smaller than any that
    stands on the row (quotients rounded to float32, as the picks saw them)."""
    weight = loads(family, seed, 2, shape.experts)
    placement = plan(weight, shape.topology, policy="deepseek", backend=backend)
    node_of_slot = np.arange(shape.topology.num_replicas) // shape.topology.replicas_per_node
    for layer, (w, c) in enumerate(zip(weight.numpy(), placement.logcnt.numpy(), strict=True)):
        for node in range(shape.topology.planned_nodes):
            row = np.unique(placement.phy2log[layer].numpy()[node_of_slot == node])
            w_row, c_row = w[row], c[row].astype(np.float32)
            given_back = w_row[c_row > 1] / (c_row[c_row > 1] - np.float32(1))
            if len(given_back):
                assert given_back.min() >= (w_row / c_row).max()


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes(), family=st.sampled_from(["continuous", "ties", "zipf", "outlier"]), seed=st.integers(0, 2**32 - 1)
)
def test_packing_is_heaviest_first_to_the_lightest(backend: str, shape: Shape, family: str, seed: int) -> None:
    """In `deepseek` every GPU's slots are filled heaviest first, and the heaviest d replicas open the d GPUs."""
    weight = loads(family, seed, 1, shape.experts)
    placement = plan(weight, shape.topology, policy="deepseek", backend=backend)
    share = (weight / placement.logcnt.to(torch.float32)).gather(1, placement.phy2log)[0]
    nodes, gpus, slots = shape.topology.planned_nodes, shape.topology.gpus_per_node, shape.topology.slots_per_gpu
    for node in share.view(nodes, gpus, slots).tolist():
        if slots == 1:
            continue
        for gpu in node:
            assert all(first >= second for first, second in itertools.pairwise(gpu))
        if all(load > 0 for gpu in node for load in gpu):
            opening = sorted((gpu[0] for gpu in node), reverse=True)
            assert opening == sorted((load for gpu in node for load in gpu), reverse=True)[:gpus]
