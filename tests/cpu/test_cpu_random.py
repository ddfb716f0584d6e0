"""Random plans, the compiled backend against the reference, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from eplb_reference.pipeline import plan_layers as reference_layers
from eplb_triton import POLICIES, Topology
from tests.cases import FAMILIES, MEAN_OVER_ROWS, loads

cpu = pytest.importorskip(
    "eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError
)

LAYERS_OF_A_FAMILY = 28


def random_shape(rng: np.random.Generator) -> tuple[int, Topology]:
    """Experts and a topology: hierarchical or global, from one expert on one GPU to 4 replicas an expert."""
    nodes = int(rng.integers(1, 5))
    groups = nodes * int(rng.integers(1, 5)) if rng.random() < 0.6 else nodes + 1
    if groups % nodes:
        nodes_planned, experts = 1, int(rng.integers(1, 33))
    else:
        nodes_planned, experts = nodes, groups * int(rng.integers(1, max(2, 33 // groups)))
    gpus = nodes_planned * int(rng.integers(1, 9))
    fewest = -(-experts // gpus)
    slots = int(rng.integers(fewest, max(fewest + 1, 4 * experts // gpus + 1)))
    return experts, Topology(num_replicas=gpus * slots, num_gpus=gpus, num_groups=groups, num_nodes=nodes)


def random_loads(rng: np.random.Generator, experts: int) -> torch.Tensor:
    """[layers, experts] of every family; the order of the layers is random, so that spans are mixed."""
    seed = int(rng.integers(2**31))
    weight = torch.cat([loads(family, seed, LAYERS_OF_A_FAMILY, experts) for family in FAMILIES])
    return weight[torch.from_numpy(rng.permutation(len(weight)))]


def assert_same_plans(policy: str, weight: torch.Tensor, topology: Topology) -> None:
    got = cpu.plan_layers(weight, topology, POLICIES[policy])
    want = reference_layers(weight, topology, POLICIES[policy])
    for name, ours, theirs in zip(("phy2log", "phyrank", "logcnt"), got, want, strict=True):
        if not torch.equal(ours, theirs):
            layer = int((ours != theirs).any(1).nonzero()[0])
            pytest.fail(f"{policy} {topology} {name} of layer {layer}: {weight[layer].tolist()} of {len(weight)}")


def compare(policy: str, plans: int, seed: int) -> None:
    """At least so many plans; a policy with a mean over the call also gets calls of few layers, which tell more."""
    rng = np.random.default_rng(seed)
    done = 0
    while done < plans:
        experts, topology = random_shape(rng)
        weight = random_loads(rng, experts)
        assert_same_plans(policy, weight, topology)
        done += len(weight)
        if policy in MEAN_OVER_ROWS:
            for first, last in pairwise([0, 1, 2, 4, 6, 9, 12, 18, 24]):
                assert_same_plans(policy, weight[first:last], topology)


@pytest.mark.parametrize("policy", POLICIES)
def test_random_plans(policy: str) -> None:
    compare(policy, plans=100_000 // len(POLICIES) + 1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_many_random_plans(policy: str) -> None:
    compare(policy, plans=1_000_000 // len(POLICIES) + 1, seed=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("experts", "topology"),
    [
        (256, Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4)),
        (256, Topology(num_replicas=288, num_gpus=32)),
        (300, Topology(num_replicas=700, num_gpus=100)),
        (257, Topology(num_replicas=514, num_gpus=257)),
        (64, Topology(num_replicas=256, num_gpus=2, num_groups=4, num_nodes=2)),
    ],
    ids=str,
)
def test_large_rows(policy: str, experts: int, topology: Topology) -> None:
    """Tournaments of two and three levels, packs of many items."""
    weight = torch.cat([loads(family, 3, 1, experts) for family in FAMILIES])
    assert_same_plans(policy, weight, topology)
