"""The exact optimum of tiny instances lies between the lower bound and every plan."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.studies.exact import optimum
from eplb_triton import POLICIES, Topology, lower_bound, plan

TINY = [
    (5, Topology(num_replicas=8, num_gpus=4)),
    (6, Topology(num_replicas=8, num_gpus=4)),
    (7, Topology(num_replicas=12, num_gpus=4)),
    (4, Topology(num_replicas=6, num_gpus=6)),
    (8, Topology(num_replicas=12, num_gpus=4, num_groups=4, num_nodes=2)),
    (6, Topology(num_replicas=8, num_gpus=4, num_groups=2, num_nodes=2)),
    (12, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)),
]


@settings(max_examples=8, deadline=None)
@given(case=st.sampled_from(TINY), rows=st.lists(st.integers(0, 60), min_size=12, max_size=12))
def test_bound_optimum_plan(case: tuple[int, Topology], rows: list[int]) -> None:
    experts, topology = case
    weight = torch.tensor([rows[:experts]], dtype=torch.float64)
    best = optimum(weight[0].numpy(), topology, seconds=4)
    if best is None:  # the solver's time is up
        return
    assert float(lower_bound(weight, topology)) <= best * (1 + 1e-6)
    for policy in POLICIES:
        peak = float(plan(weight, topology, policy=policy).gpu_loads(weight).amax())
        assert best <= peak * (1 + 1e-6)
