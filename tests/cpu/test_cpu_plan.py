"""CpuPlan: one object, any number of calls and threads, into maps of any type and strides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from eplb_triton import POLICIES, Topology
from tests.cases import loads
from tests.comparing import assert_same, assert_same_maps

pytest.importorskip("eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError)

from eplb_triton.cpu import CpuPlan, plan_layers

LAYERS, EXPERTS = 40, 64
TOPOLOGY = Topology(num_replicas=96, num_groups=8, num_nodes=4, num_gpus=16)
MOST = TOPOLOGY.num_replicas - EXPERTS + 1


class Maps(NamedTuple):
    phy2log: Tensor
    phyrank: Tensor
    logcnt: Tensor
    log2phy: Tensor | None
    bad: Tensor


def dirty_maps(dtype: torch.dtype, width: int | None) -> Maps:
    """Full of what was there before; log2phy is a slice of wider rows."""
    wide = None if width is None else torch.full((LAYERS, EXPERTS, width + 3), 77, dtype=dtype)
    return Maps(
        torch.full((LAYERS, TOPOLOGY.num_replicas), 77, dtype=dtype),
        torch.full((LAYERS, TOPOLOGY.num_replicas), 77, dtype=dtype),
        torch.full((LAYERS, EXPERTS), 77, dtype=dtype),
        None if wide is None else wide[..., :width],
        torch.full((LAYERS, TOPOLOGY.num_nodes), 77, dtype=torch.int32),
    )


def family(name: str) -> Tensor:
    return loads(name, 5, LAYERS, EXPERTS)


@pytest.mark.parametrize("policy", ["deepseek", "adaptive_tail_and_fixup", "balanced"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_fills_what_it_is_given(policy: str, dtype: torch.dtype) -> None:
    """The maps of plan_layers, and a log2phy that says where each replica is, entry by entry."""
    compiled = CpuPlan(TOPOLOGY, LAYERS, EXPERTS, POLICIES[policy], log2phy_type=dtype)
    for name in ("continuous", "zipf"):
        maps = dirty_maps(dtype, MOST)
        compiled(family(name), maps)
        want = plan_layers(family(name), TOPOLOGY, POLICIES[policy])
        assert_same_maps(maps[:3], [tensor.to(dtype) for tensor in want], name)
        assert maps.log2phy is not None
        assert (maps.bad == -1).all()
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                slots = maps.log2phy[layer, expert].tolist()
                count = int(maps.logcnt[layer, expert])
                assert slots[count:] == [-1] * (MOST - count)
                assert maps.phy2log[layer, slots[:count]].tolist() == [expert] * count
                assert maps.phyrank[layer, slots[:count]].tolist() == list(range(count))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_more_replicas_than_log2phy_is_wide(width: int) -> None:
    """The first are listed, the node of the expert is marked, and nothing beyond the width is touched."""
    compiled = CpuPlan(TOPOLOGY, LAYERS, EXPERTS, POLICIES["deepseek"])
    whole, cut = dirty_maps(torch.int64, MOST), dirty_maps(torch.int64, width)
    for maps in (whole, cut):
        compiled(family("zipf"), maps)
    assert whole.log2phy is not None
    assert cut.log2phy is not None
    assert_same(cut.log2phy, whole.log2phy[..., :width], "log2phy")
    assert cut.log2phy._base is not None
    assert (cut.log2phy._base[..., width:] == 77).all()
    nodes = torch.arange(TOPOLOGY.num_replicas) // TOPOLOGY.replicas_per_node
    for layer in range(LAYERS):
        over = {int(node) for node, rank in zip(nodes, cut.phyrank[layer], strict=True) if rank >= width}
        assert [int(status) for status in cut.bad[layer]] == [-2 if n in over else -1 for n in range(4)]
    assert (cut.bad == -2).any()


def test_allocates_no_tensor_and_takes_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CpuPlan(TOPOLOGY, LAYERS, EXPERTS, POLICIES["balanced"], log2phy_type=torch.int64)
    given, maps, arrays = family("zipf"), dirty_maps(torch.int64, MOST), dirty_maps(torch.int64, MOST)
    views = Maps(*(tensor.numpy() for tensor in arrays if tensor is not None))  # type: ignore[arg-type]
    for name in ("empty", "zeros", "full", "empty_like", "as_tensor", "from_numpy", "tensor"):
        monkeypatch.setattr(torch, name, None)
    compiled(given, maps)
    compiled(given.numpy(), views)
    monkeypatch.undo()
    for got, want in zip(arrays, maps, strict=True):
        assert got is not None
        assert want is not None
        assert_same(got, want, "a map")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_object_many_threads(policy: str) -> None:
    compiled = CpuPlan(TOPOLOGY, LAYERS, EXPERTS, POLICIES[policy], log2phy_type=torch.int64)
    given = [loads("zipf", seed, LAYERS, EXPERTS) for seed in range(8)]

    def call(nth: int) -> list[np.ndarray]:
        maps = dirty_maps(torch.int64, MOST)
        for _ in range(3):
            compiled(given[nth], maps, num_threads=2)
        return [tensor.numpy() for tensor in maps if tensor is not None]

    with ThreadPoolExecutor(8) as callers:
        together = list(callers.map(call, range(8)))
    for nth in range(8):
        for got, want in zip(together[nth], call(nth), strict=True):
            assert_same(got, want, f"a map of call {nth}")


def test_no_layers_and_layers_without_log2phy() -> None:
    none = Maps(
        torch.empty(0, 96, dtype=torch.int64),
        torch.empty(0, 96, dtype=torch.int64),
        torch.empty(0, 64, dtype=torch.int64),
        torch.empty(0, 64, 33, dtype=torch.int64),
        torch.empty(0, 4, dtype=torch.int32),
    )
    for policy in POLICIES.values():
        CpuPlan(TOPOLOGY, 0, EXPERTS, policy)(torch.empty(0, 64), none)
    maps = dirty_maps(torch.int32, None)
    CpuPlan(TOPOLOGY, LAYERS, EXPERTS, POLICIES["deepseek"])(family("zipf"), maps)
    assert maps.phy2log.max() < EXPERTS
