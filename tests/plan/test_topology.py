"""Topology refuses what cannot be planned, and says what could."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_triton import Topology
from eplb_triton.topology import _near_divisor, check_topology

NAMES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


def test_derived_sizes_hierarchical() -> None:
    topology = Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4)
    assert topology.hierarchical
    assert (topology.planned_groups, topology.planned_nodes) == (8, 4)
    assert (topology.slots_per_gpu, topology.replicas_per_node, topology.gpus_per_node) == (9, 72, 8)


def test_groups_that_no_node_count_divides_are_planned_globally() -> None:
    topology = Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=3)  # 32 % 3 does not matter then
    assert not topology.hierarchical
    assert (topology.planned_groups, topology.planned_nodes) == (1, 1)
    assert (topology.slots_per_gpu, topology.replicas_per_node, topology.gpus_per_node) == (9, 288, 32)
    topology.check_experts(257)


def test_one_node_without_groups_is_the_default() -> None:
    assert Topology(num_replicas=8, num_gpus=4) == Topology(num_replicas=8, num_gpus=4, num_groups=1, num_nodes=1)


def test_counts_go_by_name() -> None:
    """Four positional integers in another order than DeepSeek's would be taken without a word."""
    with pytest.raises(TypeError, match="positional"):
        Topology(8, 4)  # type: ignore[call-arg]


@pytest.mark.parametrize(("log2phy", "width"), [(True, 33), (False, None), (7, 7)])
def test_map_shapes(log2phy: bool | int, width: int | None) -> None:
    shapes = Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4).map_shapes(58, 256, log2phy=log2phy)
    maps = {"phy2log": (58, 288), "phyrank": (58, 288), "logcnt": (58, 256), "bad": (58, 4), "classes": (58, 256)}
    assert shapes == (maps | {"log2phy": (58, 256, width)} if width else maps)


def test_map_shapes_that_are_none() -> None:
    topology = Topology(num_replicas=16, num_gpus=8)
    with pytest.raises(ValueError, match="log2phy=0 must be at least 1"):
        topology.map_shapes(1, 12, log2phy=0)
    with pytest.raises(ValueError, match="num_layers=-1 must be at least 0"):
        topology.map_shapes(-1, 12)


def test_is_frozen_and_comparable() -> None:
    topology = Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.num_gpus = 4  # type: ignore[misc]
    assert topology == Topology(num_replicas=np.int64(16), num_gpus=8, num_groups=4, num_nodes=2)
    assert type(Topology(num_replicas=np.int64(16), num_gpus=8, num_groups=4, num_nodes=2).num_replicas) is int


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((290, 8, 4, 32), "num_replicas=290 must be a multiple of num_gpus=32; the nearest are 288 and 320"),
        ((8, 1, 1, 32), "num_replicas=8 must be a multiple of num_gpus=32; the nearest is 32"),
        ((0, 1, 1, 1), "num_replicas=0 must be at least 1; the nearest that would do is 1"),
        ((8, -2, 1, 1), "num_groups=-2 must be at least 1; the nearest that would do is 1"),
        ((8, 1, 0, 1), "num_nodes=0 must be at least 1; the nearest that would do is 1"),
        ((8, 1, 1, 0), "num_gpus=0 must be at least 1; the nearest that would do is 1"),
        (
            (288, 8, 4, 18),
            "num_gpus=18 must be a multiple of num_nodes=4 in hierarchical planning (num_groups=8 is a multiple of "
            "num_nodes); the nearest that also divides num_replicas=288 is 16",
        ),
        (
            (18, 4, 4, 6),
            "num_gpus=6 must be a multiple of num_nodes=4 in hierarchical planning (num_groups=4 is a multiple of "
            "num_nodes); the nearest are 4 and 8",
        ),
    ],
)
def test_refusals(counts: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        Topology(**dict(zip(NAMES, counts, strict=True)))
    assert str(refused.value) == message


@pytest.mark.parametrize("value", [True, 8.0, "8", None, [8]])
@pytest.mark.parametrize("name", NAMES)
def test_counts_must_be_integers(name: str, value: Any) -> None:
    counts: dict[str, Any] = {"num_replicas": 8, "num_groups": 1, "num_nodes": 1, "num_gpus": 8, name: value}
    with pytest.raises(TypeError, match=f"{name}=.* must be an integer of at least 1, not {type(value).__name__}"):
        Topology(**counts)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (0, "num_experts=0 must be at least 1: loads are [layers, experts]"),
        (
            300,
            "num_replicas=288 must be at least num_experts=300, one replica each; the nearest that num_gpus=32 "
            "divides is 320",
        ),
        (
            250,
            "num_groups=8 must divide num_experts=250 in hierarchical planning; no num_groups does with num_nodes=4; "
            "num_groups=1, num_nodes=1 plans globally",
        ),
        (
            252,
            "num_groups=8 must divide num_experts=252 in hierarchical planning; the nearest num_groups that would do "
            "is 4",
        ),
    ],
)
def test_experts_that_do_not_fit(experts: int, message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4).check_experts(experts)
    assert str(refused.value) == message


@pytest.mark.parametrize("replicas", [10**9, 10**18 + 10, 9 * 10**18])
def test_counts_of_any_size_are_refused_at_once(replicas: int) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="num_gpus=10 must be a multiple of num_nodes=4 in hierarchical planning"):
        Topology(num_replicas=replicas, num_gpus=10, num_groups=4, num_nodes=4)
    experts = (10**18 + 9) * 4
    topology = Topology(num_replicas=4 * experts, num_gpus=4, num_groups=3 * 2**40, num_nodes=2)
    with pytest.raises(ValueError, match=r"the nearest num_groups that would do is 2$"):
        topology.check_experts(experts)
    assert time.process_time() - start < 1


@given(value=st.integers(1, 400), of=st.integers(1, 12), near=st.integers(1, 400))
def test_the_nearest_divisor_is_the_nearest(value: int, of: int, near: int) -> None:
    fits = [fit for fit in range(1, value + 1) if value % fit == 0 and fit % of == 0]
    assert _near_divisor(value, of, near) == min(fits, key=lambda fit: (abs(fit - near), fit), default=None)


def test_what_is_no_topology() -> None:
    with pytest.raises(TypeError, match=r"topology is a tuple, must be a Topology: Topology\(num_replicas="):
        check_topology((16, 8))


def test_every_suggested_value_would_do() -> None:
    """Whatever nearest multiple an error names, the topology with it stands."""
    for replicas, gpus in ((288, 32), (320, 32), (288, 16)):
        Topology(num_replicas=replicas, num_gpus=gpus, num_groups=8, num_nodes=4)
    Topology(num_replicas=320, num_gpus=32, num_groups=8, num_nodes=4).check_experts(296)
    Topology(num_replicas=288, num_gpus=32, num_groups=4, num_nodes=4).check_experts(252)
