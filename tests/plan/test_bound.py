"""The lower bound against plans, and against what can be counted by hand."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_triton import Topology, lower_bound, plan
from tests.cases import FAMILIES, Shape, loads, shapes


@pytest.mark.parametrize("policy", ["deepseek", "balanced"])
@settings(max_examples=80, deadline=None)
@given(shape=shapes(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32 - 1))
def test_no_plan_is_below(policy: str, shape: Shape, family: str, seed: int) -> None:
    if family == "denormal":
        return  # a load of a few units in the last place of float32 is cut when it is shared
    weight = loads(family, seed, 2, shape.experts)
    assert (plan(weight, shape.topology, policy=policy).gap(weight) >= -1e-6).all()


def test_by_hand() -> None:
    weight = torch.tensor([[8.0, 4.0, 2.0, 2.0]])
    assert lower_bound(weight, Topology(num_replicas=4, num_gpus=4)).item() == 8  # one slot each: nothing can be shared
    assert lower_bound(weight, Topology(num_replicas=5, num_gpus=5)).item() == 4  # one redundant replica halves the 8
    assert lower_bound(weight, Topology(num_replicas=12, num_gpus=4)).item() == 4  # the mean
    assert (
        lower_bound(weight, Topology(num_replicas=4, num_gpus=2, num_groups=4, num_nodes=2)).item() == 8.0 + 2.0
    )  # two groups a node, one GPU a node
    assert lower_bound(torch.zeros(2, 4), Topology(num_replicas=8, num_gpus=4)).tolist() == [0, 0]
    assert lower_bound(weight[:0], Topology(num_replicas=8, num_gpus=4)).shape == (0,)


def test_pairing_is_stronger_than_the_mean() -> None:
    """Five experts of 3 and one of 1 on 3 GPUs of two slots: two of the 3s meet."""
    weight = torch.tensor([[3.0, 3.0, 3.0, 3.0, 3.0, 1.0]])
    topology = Topology(num_replicas=6, num_gpus=3)
    assert lower_bound(weight, topology, pairing=False).item() == pytest.approx(16 / 3)
    assert lower_bound(weight, topology).item() == pytest.approx(6, rel=2e-5)
    assert plan(weight, topology, policy="balanced").gap(weight).item() == pytest.approx(0, abs=2e-5)


def test_idle_layers_have_no_gap() -> None:
    weight = torch.zeros(2, 8)
    assert plan(weight, Topology(num_replicas=12, num_gpus=4), policy="balanced").gap(weight).tolist() == [0, 0]


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("scipy", "eplb_triton.bound.pairing")):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    weight = torch.ones(1, 6)
    with pytest.raises(ImportError, match=r"pip install eplb-triton\[bound\], or pass pairing=False"):
        lower_bound(weight, Topology(num_replicas=8, num_gpus=4))
    assert lower_bound(weight, Topology(num_replicas=8, num_gpus=4), pairing=False).item() == 1.5


@pytest.mark.parametrize(
    ("weight", "topology", "message"),
    [
        (torch.ones(4), Topology(num_replicas=4, num_gpus=4), "must be 2-D"),
        (torch.ones(1, 9), Topology(num_replicas=8, num_gpus=4), "num_replicas=8 must be at least num_experts=9"),
    ],
)
def test_refused(weight: torch.Tensor, topology: Topology, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lower_bound(weight, topology)


@pytest.mark.parametrize("pairing", [True, False])
@pytest.mark.parametrize("counts", [(8, 4, 1, 1), (12, 4, 1, 1), (12, 4, 4, 2), (64, 16, 16, 4)])
def test_no_layers(counts: tuple[int, int, int, int], pairing: bool) -> None:
    """Two slots a GPU, others, nodes, and more partitions than are tried."""
    replicas, gpus, groups, nodes = counts
    topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
    experts = groups if groups > 8 else 8
    bound = lower_bound(torch.empty(0, experts), topology, pairing=pairing)
    assert (bound.shape, bound.dtype) == ((0,), torch.float64)
    assert plan(torch.empty(0, experts), topology).gap(torch.empty(0, experts), pairing=pairing).shape == (0,)
