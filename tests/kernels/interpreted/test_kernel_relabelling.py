"""The relabelling kernel in the interpreter: the reference's slots and maps on drawn ones of all shapes, and what a
relabelled plan is without it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Planner, Topology, plan
from eplb_triton.kernels import relabelling_launcher
from eplb_triton.kernels.launcher import Outputs
from eplb_triton.kernels.relabelling_launcher import RelabelLaunch, relabel_spec
from eplb_triton.slot_maps import rank_replicas, slots_of_experts
from tests.replanning.cases import SHAPES, relabel, traffic
from tests.sizes import chosen

pytestmark = pytest.mark.other_triton

DRAWN = {
    "global": Topology(num_replicas=40, num_gpus=8),
    "nodes": Topology(num_replicas=48, num_gpus=12, num_groups=6, num_nodes=3),
    "a GPU a node": Topology(num_replicas=20, num_gpus=4, num_groups=4, num_nodes=4),
    "nodes of one slot": Topology(num_replicas=6, num_gpus=6, num_groups=6, num_nodes=6),
    "two slots": Topology(num_replicas=40, num_gpus=20),
    "one slot": Topology(num_replicas=12, num_gpus=12),
    "one GPU": Topology(num_replicas=17, num_gpus=1),
    "one replica": Topology(num_replicas=1, num_gpus=1),
}
PROPERTY = {**SHAPES, "one GPU": (12, DRAWN["one GPU"])}
POISON = -7


def _relabelled(
    before: Tensor, planned: Tensor, experts: int, topology: Topology, *, width: int | None = None, bad: int = -1
) -> Outputs:
    """What a launch makes of a plan; all but its slots and `bad` poison."""
    layers, kind = len(planned), planned.dtype
    launch = RelabelLaunch(topology, layers, experts, dtype=kind, log2phy_width=width, device="cpu")
    for tensor in launch.scratch:
        tensor.view(torch.uint8).fill_(0xAB)
    shapes = topology.map_shapes(layers, experts, log2phy=False if width is None else width)
    maps = {name: torch.full(shape, POISON, dtype=kind) for name, shape in shapes.items()}
    status = torch.full(shapes["bad"], bad, dtype=torch.int32)
    out = Outputs(planned.clone(), maps["phyrank"], maps["logcnt"], maps.get("log2phy"), status)
    launch(before, out)
    return out


def _check(out: Outputs, slots: Tensor, experts: int) -> None:
    """The slots of the reference, and the maps that follow from them."""
    assert torch.equal(out.phy2log, slots.to(out.phy2log.dtype))
    rank, count = rank_replicas(out.phy2log, experts)
    assert torch.equal(out.phyrank, rank)
    assert torch.equal(out.logcnt, count)
    if out.log2phy is not None:
        width = out.log2phy.shape[2]
        assert torch.equal(out.log2phy, slots_of_experts(out.phy2log, rank, experts, width))
        crowded = (count > width).any(1, keepdim=True)
        assert torch.equal(out.bad == -2, crowded.expand_as(out.bad))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", DRAWN)
def test_slots_of_any_kind(shape: str, dtype: torch.dtype) -> None:
    """Drawn, and so with experts twice on a GPU, of few experts and of many; empty slots, and what is no expert."""
    topology = DRAWN[shape]
    random = torch.Generator().manual_seed(5)
    groups, replicas = topology.num_groups, topology.num_replicas
    numbers = groups, max(1, replicas // 3 // groups) * groups, replicas // groups * groups
    for experts, width in zip(numbers, (2, None, replicas), strict=True):
        slots = torch.randint(0, experts, (2, 6, replicas), generator=random)
        before, planned = slots[0], slots[1]
        planned[:, :experts] = torch.arange(experts)
        before[1:3][torch.rand(2, replicas, generator=random) < 0.3] = -1
        before[3] = planned[3]
        before[4] = planned[4].flip(0)
        before[5] = -1
        want = relabel("reference", before, planned, topology)
        given = before.to(dtype)
        given[1:3][given[1:3] < 0] = experts
        given[5] = torch.iinfo(dtype).min
        _check(_relabelled(given, planned.to(dtype), experts, topology, width=width), want, experts)


def test_tiles_as_narrow_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(*arguments: Any, **options: Any) -> object:
        kernel, shape = relabel_spec(*arguments, **options)
        return kernel, replace(shape, lanes=32)

    experts, topology = SHAPES["grouped"]
    old, new = (plan(loads, topology, backend="reference").phy2log for loads in traffic(4, 2, 2, experts))
    want = _relabelled(old, new, experts, topology, width=17)
    monkeypatch.setattr(relabelling_launcher, "relabel_spec", narrow)
    for got, its in zip(_relabelled(old, new, experts, topology, width=17), want, strict=True):
        assert got is not None
        assert its is not None
        assert torch.equal(got, its)
    _check(want, relabel("reference", old, new, topology), experts)


@pytest.mark.parametrize("policy", chosen(["balanced", "deepseek"], "deepseek"))
def test_the_same_plan_with_few_slots_written(policy: str) -> None:
    """Every GPU holds what some GPU of the plan holds, on one node what is together there; over a series fewer slots
    are written than by the plan as it came."""
    for experts, topology in PROPERTY.values():
        written = as_it_came = 0
        for loads in itertools.pairwise(traffic(20, 3, 2, experts)):
            old, new = (plan(step, topology, policy=policy, backend="reference").phy2log for step in loads)
            out = _relabelled(old, new, experts, topology, width=topology.num_replicas - experts + 1)
            for got, planned in zip(out.phy2log, new, strict=True):
                assert _nodes(got, topology) == _nodes(planned, topology)
            Placement(
                out.phy2log, out.phyrank, out.logcnt, topology, policy, out.log2phy, out.bad
            ).validate()  # groups whole on a node, maps inverse to each other
            written += int((out.phy2log != old).sum())
            as_it_came += int((new != old).sum())
        assert written <= as_it_came


def _nodes(slots: Tensor, topology: Topology) -> Counter[tuple[tuple[int, ...], ...]]:
    """Nodes as sorted GPUs of sorted experts, and how often each occurs."""
    gpus = slots.view(topology.planned_nodes, topology.gpus_per_node, -1).sort(2).values.tolist()
    return Counter(tuple(sorted(map(tuple, node))) for node in gpus)


@pytest.mark.parametrize("shape", PROPERTY)
def test_what_is_in_force_already_is_found_again(shape: str) -> None:
    """Nodes, GPUs and slots in any order: nothing is written, but where two GPUs hold the same."""
    experts, topology = PROPERTY[shape]
    old = plan(traffic(21, 1, 2, experts)[0], topology, policy="balanced", backend="reference").phy2log
    packs = old.view(2, topology.planned_nodes, topology.gpus_per_node, -1)
    for planned in (packs, packs.flip(1, 2, 3), packs.roll(1, 2)):
        out = _relabelled(old, planned.reshape(2, -1), experts, topology)
        assert torch.equal(out.phy2log, old)


def test_bad_loads_go_with_their_nodes() -> None:
    """And stay where log2phy is too narrow: only a row without one says that."""
    experts, topology = 4, Topology(num_replicas=12, num_gpus=4, num_groups=2, num_nodes=2)
    old = torch.tensor([[0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]])
    planned = torch.tensor([[3, 2, 3, 2, 3, 2, 1, 0, 1, 0, 1, 1]])
    for width, status in ((4, [-1, 3]), (3, [-2, 3])):
        launch = RelabelLaunch(topology, 1, experts, log2phy_width=width, device="cpu")
        out = Outputs(
            planned.clone(),
            torch.full((1, 12), POISON),
            torch.full((1, experts), POISON),
            torch.full((1, experts, width), POISON),
            torch.tensor([[3, -1]], dtype=torch.int32),
        )
        launch(old, out)
        assert out.phy2log.tolist() == [[0, 1, 1, 1, 0, 1, 2, 3, 2, 3, 2, 3]]
        assert out.bad.tolist() == [status]
        assert out.log2phy is not None
        assert out.log2phy[0, 1].tolist() == [1, 2, 3, 5][:width]
        assert out.log2phy[0, 0].tolist() == [0, 4, -1, -1][:width]


@pytest.mark.parametrize(("policy", "dtype"), [("balanced", torch.int64), ("deepseek", torch.int32)])
def test_through_a_planner(policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's placement from one in force, and nothing is allocated for it."""
    experts, topology = 12, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)
    first, second = traffic(30, 2, 2, experts)
    planner = Planner(topology, 2, experts, policy=policy, dtype=dtype, backend="triton", log2phy=True)
    live, ahead, again = planner(first), planner.empty(), planner.empty()
    with monkeypatch.context() as patch:
        for factory in ("empty", "zeros", "full", "empty_like", "zeros_like", "full_like", "tensor", "arange", "where"):
            patch.setattr(torch, factory, _refuse)
        assert planner(second, out=ahead, previous=live) is ahead
        planner(second, out=again, previous=ahead)
    want = plan(
        second, topology, previous=live, policy=policy, dtype=dtype, backend="reference", log2phy=True
    )  # fmt: skip
    for name in ("phy2log", "phyrank", "logcnt", "log2phy", "bad", "classes"):
        assert torch.equal(getattr(ahead, name), getattr(want, name)), name
    ahead.validate()
    assert again.fingerprint() == ahead.fingerprint()


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a planner allocated after it was made")


def test_over_an_engines_tensors_from_gpus_that_have_just_joined() -> None:
    experts, topology = SHAPES["global"]
    loads = traffic(31, 1, 2, experts)[0]
    slots = plan(loads, topology, "balanced").phy2log
    slots[:, -10:] = -1
    before = Placement.from_phy2log(slots, experts, topology)
    room = torch.full((2, experts, 8), POISON)
    planner = Planner(topology, 2, experts, policy="balanced", backend="triton", log2phy=5)
    maps = {"phy2log": torch.zeros(2, 80, dtype=torch.int64), "logcnt": torch.zeros(2, experts, dtype=torch.int64)}
    out = planner.over(**maps, log2phy=room[..., :5])
    planner(loads, out=out, previous=before)
    want = plan(loads, topology, "balanced", previous=before, backend="reference")
    assert torch.equal(maps["phy2log"], want.phy2log)
    assert torch.equal(room[..., :5], want.slots_of_experts(5))
    assert (room[..., 5:] == POISON).all()
    assert torch.equal(maps["phy2log"][:, :-10], slots[:, :-10])  # the same loads: the same plan again
    apart = torch.zeros(2, 160, dtype=torch.int64)[:, ::2]
    odd = Placement(apart, apart, before.logcnt, topology, "odd")
    with pytest.raises(ValueError, match=r"before has strides \(160, 2\), must be contiguous"):
        planner(loads, previous=odd)
