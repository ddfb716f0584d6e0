"""What the fused kernel takes and refuses: loads of any type and strides, bad loads, no layers, maps of any width."""

from __future__ import annotations

import pytest
import torch

from eplb_reference import plan_layers
from eplb_triton import POLICIES, Topology
from eplb_triton.kernels.launcher import Launch, first_bad_load, launch
from tests.cases import loads
from tests.comparing import assert_same
from tests.kernels.interpreted.launches import poisoned


def test_bad_loads_count_as_zero_and_are_recorded() -> None:
    topology = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    weight = loads("continuous", 6, 3, 12)
    weight[1, 9], weight[1, 4], weight[2, 11], weight[2, 0] = torch.nan, -1.0, torch.inf, 2.0**101
    weight[0, 3] = -0.0
    cleaned = torch.where((weight > 0) & (weight <= 2.0**100), weight, 0.0)
    for name in ("deepseek", "adaptive_tail_and_2x2_fixup"):  # with and without the kernel that measures rows first
        policy = POLICIES[name]
        got = poisoned(weight, topology, policy)
        assert_same(got.phy2log, plan_layers(cleaned, topology, policy)[0], f"phy2log of {name}")
        assert sorted(got.bad[0].tolist()) == [-1, -1]
        assert first_bad_load(got.bad) == (1, 4)
    assert first_bad_load(poisoned(cleaned, topology, POLICIES["deepseek"]).bad) is None


@pytest.mark.other_triton
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
def test_loads_of_any_type_are_rounded_once(dtype: torch.dtype) -> None:
    weight = loads("continuous", 7, 2, 12).clamp(max=100).to(dtype)
    if dtype == torch.int64:
        weight = weight + 2**53 + torch.arange(24).view(2, 12) * (2**29 + 1)  # a second rounding would show
    if dtype == torch.float64:
        weight = weight * (1 + 2.0**-25)
    got = poisoned(weight, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"])
    want = plan_layers(
        weight.to(torch.float32), Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    )
    assert_same(got.phy2log, want[0], "phy2log")


def test_strides_types_and_absent_maps() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    weight = loads("continuous", 8, 2, 12)
    want = poisoned(weight, topology, policy)
    spread = torch.full((12, 7), torch.nan)
    spread[:, 1:5:3] = weight.T
    got = launch(spread[:, 1:5:3].T, topology, policy, dtype=torch.int32, want_log2phy=True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.int32
        assert_same(mine.to(torch.int64), theirs.to(torch.int64), "a map")
    assert launch(weight, topology, policy).log2phy is None


@pytest.mark.parametrize("policy", POLICIES)
def test_no_layers(policy: str) -> None:
    got = launch(
        torch.empty(0, 12),
        Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2),
        POLICIES[policy],
        want_log2phy=True,
    )
    assert [tuple(tensor.shape) for tensor in got if tensor is not None] == [
        (0, 16),
        (0, 16),
        (0, 12),
        (0, 12, 5),
        (0, 2),
    ]


@pytest.mark.parametrize(
    ("experts", "topology", "message"),
    [
        (2049, Topology(num_replicas=4096, num_gpus=1), "num_experts=2049 must be at most 2048"),
        (2048, Topology(num_replicas=4097, num_gpus=1), "num_replicas=4097 must be at most 4096"),
        (2048, Topology(num_replicas=2049, num_gpus=2049), "num_gpus=2049 must be at most 2048"),
        (12, Topology(num_replicas=10, num_gpus=1), "num_replicas=10 must be at least num_experts=12"),
    ],
)
def test_sizes_are_refused(experts: int, topology: Topology, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(torch.ones(1, experts), topology, POLICIES["deepseek"])


def test_wrong_types_are_refused() -> None:
    topology, policy = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2), POLICIES["deepseek"]
    with pytest.raises(ValueError, match=r"loads_dtype=torch.bool must be one of torch.float16"):
        Launch(topology, 1, 12, policy, loads_dtype=torch.bool, device="cpu")
    with pytest.raises(ValueError, match=r"dtype=torch.int16 must be torch.int64 or torch.int32"):
        Launch(topology, 1, 12, policy, dtype=torch.int16, device="cpu")
    with pytest.raises(ValueError, match=r"log2phy_width=0 must be at least 1"):
        Launch(topology, 1, 12, policy, log2phy_width=0, device="cpu")
    with pytest.raises(ValueError, match=r"num_layers=-1 must be at least 0"):
        Launch(topology, -1, 12, policy, device="cpu")


def test_log2phy_of_any_width_and_strides() -> None:
    """Rows that lie apart and are wider or narrower than the plan needs; what is left out is told."""
    topology, policy = Topology(num_replicas=24, num_gpus=6, num_groups=2, num_nodes=2), POLICIES["deepseek"]
    weight = torch.ones(2, 12)
    weight[0, 3] = 1000.0  # 7 replicas
    want = poisoned(weight, topology, policy)
    assert want.log2phy is not None
    for width in (1, 3, 7, 13, 20):
        room = torch.full((2, 14, 40), -7)
        view = room[:, 1:13, 5 : 5 + width]
        got = want._replace(log2phy=view, bad=torch.full((2, 2), -7, dtype=torch.int32))
        Launch(topology, 2, 12, policy, log2phy_width=width, device="cpu")(weight, got)
        whole = torch.nn.functional.pad(want.log2phy, (0, 20), value=-1)
        assert torch.equal(view, whole[..., :width])
        room[:, 1:13, 5 : 5 + width] = -7
        assert bool((room == -7).all())
        crowded = want.logcnt.view(2, 2, 6).amax(2) > width  # group g is on node g
        assert torch.equal(got.bad, torch.where(crowded, -2, -1).to(torch.int32))


def test_partitions_are_owned_by_the_launch() -> None:
    topology = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    first = Launch(topology, 1, 12, POLICIES["balanced"], device="cpu")
    address = first.partitions.data_ptr()
    assert first.partitions.shape == (3, 4)
    for groups in range(6, 76):  # more tables than any cache of old ones would hold
        others = Topology(num_replicas=groups, num_gpus=1, num_groups=groups)
        Launch(others, 0, groups, POLICIES["balanced"], device="cpu")
    again = Launch(topology, 1, 12, POLICIES["balanced"], device="cpu")
    assert again.partitions.data_ptr() == address
