"""Replanning: what a plan is, without an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eplb_triton import Policy, Topology
from eplb_triton.policy import Replan
from eplb_triton.replan_status import (
    EMPTY_ON_NODES,
    EXPERTS_MISSING,
    FINE,
    GROUP_SPLIT,
    GROUPS_UNEVEN,
    OUT_OF_RANGE,
    STATUS_WORDS,
)
from tests.backends import CPU_BACKENDS
from tests.replanning.cases import GLOBAL, GROUPED, SHAPES, STEADY, in_force, replan, traffic, valid

LAYERS, STEPS = 3, 24


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("shape", SHAPES)
def test_placements_within_the_slots_asked_for(backend: str, shape: str) -> None:
    experts, topology = SHAPES[shape]
    history = traffic(1, STEPS, LAYERS, experts)
    live = in_force(history, topology)
    for moves in (0, 1, 2, 5, 11, None):
        made = replan(backend, history, topology, live, price=0.0, moves=moves)
        valid(made, experts, topology)
        assert torch.equal(made.written, (made.phy2log != live).sum(1))
        assert moves is None or int(made.written.max()) <= moves
        assert (made.peak_after <= made.peak_before).all()
    assert int(made.written.max()) > (0 if shape == "many slots" else 11)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_predicted_peak_is_the_placements_own(backend: str, shape: str) -> None:
    """Planned again at a price that nothing pays, a placement has the peak that was predicted of it, and stays."""
    experts, topology = SHAPES[shape]
    history = traffic(2, STEPS, LAYERS, experts)
    first = replan(backend, history, topology, None)
    made = replan(backend, history, topology, in_force(history, topology))
    for before in (first, made):
        still = replan(backend, history, topology, before.phy2log, price=1e12)
        assert torch.equal(still.phy2log, before.phy2log)
        assert torch.equal(still.peak_before, before.peak_after)
        assert torch.equal(still.peak_after, before.peak_after)
        assert not still.written.any()
    assert first.peak_before.isnan().all()
    assert first.written.tolist() == [topology.num_replicas] * LAYERS


def test_the_predicted_peak_from_the_text(backend: str) -> None:
    """Of equal loads in every step: no deviation, so that the peak is the busiest GPU of the mean load."""
    loads = torch.arange(1, 13, dtype=torch.float32).expand(4, 1, 12)
    topology = Topology(num_replicas=12, num_gpus=4)
    live = torch.arange(12).expand(1, 12)
    made = replan(backend, loads, topology, live, price=1e12)
    # GPU loads 6, 15, 24, 33 of 78; the power mean of norm 16 over four of them is 4 ** (-1 / 16) of the largest.
    assert made.peak_before.item() == pytest.approx(33 / 19.5 * 4 ** (-1 / 16), rel=0.01)


def test_higher_prices_write_less(backend: str) -> None:
    history = traffic(3, STEPS, 6, 64)
    live = in_force(history, GLOBAL)
    written = [int(replan(backend, history, GLOBAL, live, price=price).written.sum()) for price in (0, 1e-3, 1e-2, 1)]
    assert written == sorted(written, reverse=True)
    assert written[0] > written[2] > written[3] == 0


def test_a_layer_alone_is_as_in_the_batch(backend: str) -> None:
    history = traffic(4, STEPS, 4, 64)
    history[:16, 2] *= torch.linspace(0, 40, 64)  # that layer's history is cut, so that its samples are fewer
    history[3:, 1] = 0
    for live in (in_force(history, GROUPED), None):
        made = replan(backend, history, GROUPED, live)
        for layer in range(4):
            one = slice(layer, layer + 1)
            alone = replan(backend, history[:, one], GROUPED, None if live is None else live[one])
            for ours, theirs in zip(alone, made, strict=True):
                assert torch.equal(ours.nan_to_num(-1.0), theirs[one].nan_to_num(-1.0))


def test_one_thread_or_two() -> None:
    history = traffic(5, STEPS, 7, 64)
    live = in_force(history, GLOBAL)
    one, two, many = (replan("cpu", history, GLOBAL, live, num_threads=threads) for threads in (1, 2, 16))
    for ours, theirs, others in zip(one, two, many, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, others)
    with pytest.raises(ValueError, match=r"num_threads=0 must be at least 1"):
        replan("cpu", history, GLOBAL, live, num_threads=0)


def test_which_experts_are_hot_together_counts(backend: str) -> None:
    """Each expert's loads shuffled over the steps: the means stay, the coincidences go, and the plan is another."""
    history = traffic(6, 32, 4, 64)
    random = torch.Generator().manual_seed(0)
    shuffled = history.gather(0, torch.rand(history.shape, generator=random).argsort(0))
    assert torch.equal(shuffled.sum(0), history.sum(0))
    live = in_force(history.sum(0, keepdim=True), GLOBAL)
    together, apart = (replan(backend, loads, GLOBAL, live) for loads in (history, shuffled))
    assert (together.phy2log != apart.phy2log).any(1).all()


def test_experts_hot_together_are_parted(backend: str) -> None:
    """Two pairs of experts, each pair hot in the same steps and on one GPU: one exchange parts both."""
    loads = torch.full((16, 1, 4), 10.0)
    loads[::2, 0, :2] += 30
    loads[1::2, 0, 2:] += 30
    topology = Topology(num_replicas=4, num_gpus=2)
    made = replan(backend, loads, topology, torch.tensor([[0, 1, 2, 3]]), policy=_with(z=1.0))
    assert made.written.tolist() == [2]
    assert [sorted(gpu) for gpu in made.phy2log.view(2, 2).tolist()] in ([[0, 2], [1, 3]], [[1, 2], [0, 3]])
    still = replan(backend, loads.mean(0, keepdim=True), topology, torch.tensor([[0, 1, 2, 3]]), policy=_with(z=1.0))
    assert still.written.tolist() == [0]


def test_steps_before_a_change_of_traffic_do_not_count(backend: str) -> None:
    new, old = traffic(7, 16, 2, 64), traffic(8, 16, 2, 64).flip(2)
    live = in_force(old, GLOBAL)
    assert torch.equal(
        replan(backend, torch.cat((old, new)), GLOBAL, live).phy2log, replan(backend, new, GLOBAL, live).phy2log
    )


def test_the_newest_4096_steps_count_and_idle_ones_do_not(backend: str) -> None:
    newest = traffic(9, 4096, 1, 12)
    topology = Topology(num_replicas=16, num_gpus=4)
    live = in_force(newest, topology)
    want = replan(backend, newest, topology, live)
    older = torch.cat((1e6 * newest[:5].flip(2), newest))
    assert torch.equal(replan(backend, older, topology, live).phy2log, want.phy2log)
    few = newest[:20]
    idle = torch.zeros(40, 1, 12)
    idle[::2] = few
    assert torch.equal(replan(backend, idle, topology, live).phy2log, replan(backend, few, topology, live).phy2log)


def test_scale_and_dtype_do_not_matter(backend: str) -> None:
    history = traffic(10, STEPS, 2, 64)
    live = in_force(history, GLOBAL)
    want = replan(backend, history, GLOBAL, live)
    for factor in (2.0**-120, 2.0**60):
        made = replan(backend, history * factor, GLOBAL, live)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, want, strict=True))


def test_joined_gpus_are_filled(backend: str) -> None:
    """Slots of -1 get experts that their GPU does not hold, the missing ones first; fills are no moves."""
    history = traffic(11, STEPS, 2, 64)
    live = in_force(history, GLOBAL)
    live[:, -10:] = -1
    made = replan(backend, history, GLOBAL, live, moves=0)
    valid(made, 64, GLOBAL)
    assert made.fills.tolist() == [10, 10]
    assert not made.written.any()
    assert torch.equal(made.phy2log[:, :-10], live[:, :-10])
    for gpu in made.phy2log[:, -10:].reshape(-1, 5).tolist():
        assert len(set(gpu)) == 5
    moved = replan(backend, history, GLOBAL, live, price=0.0, moves=4)
    assert torch.equal(moved.written, (moved.phy2log != made.phy2log).sum(1))
    assert int(moved.written.max()) <= 4


def _swap_over_nodes(live: Tensor) -> None:
    live[[0, 40]] = live[[40, 0]]


BAD: dict[int, tuple[Topology, Callable[[Tensor], object]]] = {
    OUT_OF_RANGE: (GLOBAL, lambda live: live[79:].fill_(64)),
    EMPTY_ON_NODES: (GROUPED, lambda live: live[3:4].fill_(-1)),
    EXPERTS_MISSING: (GLOBAL, lambda live: live.copy_(torch.arange(80) % 63)),
    GROUP_SPLIT: (GROUPED, _swap_over_nodes),
    GROUPS_UNEVEN: (GROUPED, lambda live: live.copy_(torch.cat((torch.arange(40), 40 + torch.arange(40) % 24)))),
}
"""By status: a topology, and how to make a layer of its placement one that cannot be planned on."""


@pytest.mark.parametrize("status", BAD)
def test_layers_that_cannot_be_planned_on_stay(backend: str, status: int) -> None:
    topology, spoil = BAD[status]
    history = traffic(12, STEPS, 3, 64)
    live = in_force(history, topology)
    want = replan(backend, history, topology, live)
    spoil(live[1])
    made = replan(backend, history, topology, live)
    assert made.status.tolist() == [FINE, status, FINE]
    assert torch.equal(made.phy2log[1], live[1])
    assert int(made.written[1]) == int(made.fills[1]) == 0
    assert made.peak_before[1].isnan()
    assert made.peak_after[1].isnan()
    for layer in (0, 2):
        assert torch.equal(made.phy2log[layer], want.phy2log[layer])
    assert STATUS_WORDS[status]


def test_backends_agree_on_other_rules() -> None:
    history = traffic(13, 40, 2, 64)
    for topology in (GLOBAL, GROUPED):
        live = in_force(history, topology)
        for policy in (
            _with(samples=1),
            _with(samples=7),
            _with(moves=3, fresh_moves=0),
            _with(moves=2, fresh_moves=40),
            *(_with(norm=norm) for norm in (2, 4, 8, 32)),
            _with(z=0.0),
            _with(z=8.0),
        ):
            ours, theirs = (
                replan(backend, history, topology, live, policy=policy, price=1e-5) for backend in CPU_BACKENDS
            )
            assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True)), policy.replan


@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_where_little_is_left(shape: str) -> None:
    """Compiled code looks for swaps in float32: of loads that vary little beside bursts that a swap takes away."""
    experts, topology = SHAPES[shape]
    random = torch.Generator().manual_seed(12)
    history = 1000 + torch.rand(STEPS, 6, experts, generator=random)
    for layer, burst in enumerate((0.0, 1e3, 1e4, 1e5, 1e6, 1e8)):
        history[layer::7, layer, : experts // 4] += burst
    live = in_force(history, topology)
    for price in (0.0, 1e-5, 1e-3):
        ours, theirs = (replan(backend, history, topology, live, price=price) for backend in CPU_BACKENDS)
        assert torch.equal(ours.phy2log, theirs.phy2log)
        assert torch.equal(ours.peak_after, theirs.peak_after)


def test_other_policies_do_not_replan(backend: str) -> None:
    with pytest.raises(ValueError, match=r"policy='plain' does not replan; one with `replan`, like 'steady', does"):
        replan(backend, torch.ones(1, 1, 64), GLOBAL, None, policy=Policy("plain"))


def _with(**fields: object) -> Policy:
    """`steady` with other fields of its rule."""
    return replace(STEADY, name="other", replan=replace(Replan(), **fields))  # type: ignore[arg-type]
