"""The compiled CPU twin of the stages of `balanced` gives the reference's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eplb_reference import plan_layers as reference
from eplb_triton import EFFORTS, POLICIES, Topology
from eplb_triton.policy import Corner, Exchange, Nearest, Paired, Policy
from tests.cases import FAMILIES, Shape, loads, shapes
from tests.comparing import assert_same_maps
from tests.sizes import chosen

pytest.importorskip("numba", reason="pip install -e .[cpu]")
from eplb_triton.cpu import plan_layers as compiled

BALANCED = POLICIES["balanced"]
POLICIES_TO_COMPARE = {
    **EFFORTS,
    "other steps": replace(
        BALANCED,
        fixup=Paired(moves=9, donors=2),
        gpu_refine=Exchange(pair_rounds=1, match_rounds=3, proposers=2, double_steps=20, candidates=500),
    ),
    "dhondt in blocks": Policy("x", gpu_pack="blocks", gpu_refine=Exchange(pair_rounds=2, match_rounds=2)),
    "capped, packed plainly": Policy("x", counts="capped", group_refine=Nearest(1, 1), gpu_refine=Corner(2)),
    "waterfill in blocks": Policy("x", counts="waterfill", group_pack="partition", gpu_pack="blocks"),
}


def assert_equals_reference(weight: Tensor, topology: Topology, policy: Policy) -> None:
    assert_same_maps(compiled(weight, topology, policy), reference(weight, topology, policy))


@pytest.mark.parametrize("policy", chosen(POLICIES_TO_COMPARE, "low", "medium", "other steps"))
@settings(max_examples=150, deadline=None)
@given(shape=shapes(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32 - 1))
def test_random(policy: str, shape: Shape, family: str, seed: int) -> None:
    assert_equals_reference(loads(family, seed, 3, shape.experts), shape.topology, POLICIES_TO_COMPARE[policy])


@pytest.mark.parametrize(
    ("experts", "topology"),
    [
        (256, Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4)),
        (256, Topology(num_replicas=288, num_gpus=32)),
        (256, Topology(num_replicas=288, num_gpus=144)),
        (512, Topology(num_replicas=1024, num_gpus=128)),
        (128, Topology(num_replicas=160, num_gpus=16, num_groups=32, num_nodes=8)),  # more partitions than are tried
        (7, Topology(num_replicas=64, num_gpus=8)),  # the cap is lifted
    ],
)
@pytest.mark.parametrize("family", ["continuous", "ties", "outlier"])
def test_shapes_of_models(experts: int, topology: Topology, family: str) -> None:
    assert_equals_reference(loads(family, 5, 6, experts), topology, BALANCED)
