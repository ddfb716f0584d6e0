"""The same loads give the same bits, however they come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from eplb_triton import POLICIES, Placement, Topology, plan
from tests.backends import CPU_BACKENDS
from tests.cases import FAMILIES, MEAN_OVER_ROWS, loads
from tests.comparing import assert_same

pytestmark = [pytest.mark.parametrize("backend", CPU_BACKENDS), pytest.mark.parametrize("policy", POLICIES)]

SHAPES = {
    "hierarchical": (64, Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2)),
    "global": (60, Topology(num_replicas=96, num_gpus=24)),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: Placement, b: Placement) -> bool:
    return (
        torch.equal(a.phy2log, b.phy2log)
        and torch.equal(a.slots_of_experts(), b.slots_of_experts())
        and torch.equal(a.logcnt, b.logcnt)
        and a.fingerprint() == b.fingerprint()
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
def test_one_thread_or_two(policy: str, backend: str, shape: str) -> None:
    experts, topology = SHAPES[shape]
    weight = torch.cat([loads(family, 5, 40, experts) for family in FAMILIES])
    torch.set_num_threads(1)
    one = plan(weight, topology, policy=policy, backend=backend)
    torch.set_num_threads(2)
    assert same(one, plan(weight, topology, policy=policy, backend=backend))


@pytest.mark.parametrize("shape", SHAPES)
def test_dtype_strides_and_gradients_do_not_matter(policy: str, backend: str, shape: str) -> None:
    experts, topology = SHAPES[shape]
    weight = loads("ties", 6, 4, experts)
    expected = plan(weight, topology, policy=policy, backend=backend)
    wide = torch.zeros(4, 2 * experts)
    wide[:, ::2] = weight
    for other in (
        weight.to(torch.int64),
        weight.to(torch.float64),
        weight.to(torch.bfloat16),
        weight.to(torch.uint8),
        weight.t().contiguous().t(),
        wide[:, ::2],
        torch.where(weight == 0, -0.0, weight),
        weight.clone().requires_grad_(),
    ):
        got = plan(other, topology, policy=policy, backend=backend)
        assert same(got, expected)
        assert not got.phy2log.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_alone_and_in_a_batch(policy: str, backend: str, shape: str) -> None:
    """Layers are independent, but for the tails that look at the mean over all of the call: there, a call of equal
    layers is the same as one of them."""
    experts, topology = SHAPES[shape]
    weight = torch.cat([loads(family, 7, 2, experts) for family in FAMILIES])
    if policy in MEAN_OVER_ROWS:
        weight = weight[:1].expand(8, -1)
    batch = plan(weight, topology, policy=policy, backend=backend)
    for layer in range(len(weight)):
        alone = plan(weight[layer : layer + 1], topology, policy=policy, backend=backend)
        assert_same(alone.phy2log[0], batch.phy2log[layer], f"phy2log of layer {layer}")
        assert_same(alone.phyrank[0], batch.phyrank[layer], f"phyrank of layer {layer}")


def test_the_input_is_left_alone(policy: str, backend: str) -> None:
    experts, topology = SHAPES["hierarchical"]
    weight = torch.where(loads("ties", 8, 3, experts) == 0, -0.0, 1.0)
    before = weight.clone()
    plan(weight, topology, policy=policy, backend=backend)
    assert weight.view(torch.int32).equal(before.view(torch.int32))
