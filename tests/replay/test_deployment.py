"""Replay: when plans are made, what they see, how they come into force, and how steps are judged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Planner, Topology
from eplb_triton.formats import read_loads
from eplb_triton.replay import Plan, Rules, Summary, replay_steps
from eplb_triton.synthetic import serving_steps
from tests.backends import CPU_BACKENDS

TOPOLOGY = Topology(num_replicas=4, num_gpus=2)
START = Placement.from_phy2log(torch.tensor([[0, 1, 2, 3]] * 3), 4, TOPOLOGY)
OTHER = Placement.from_phy2log(torch.tensor([[0, 3, 2, 1]] * 3), 4, TOPOLOGY)


def steps(num_steps: int) -> Iterator[Tensor]:
    """Step t holds t everywhere."""
    for number in range(1, num_steps + 1):
        yield torch.full((3, 4), float(number))


def recording(seen: list[tuple[list[float], bool]], gives: Placement = OTHER) -> Plan:
    """A planner that notes the steps it is given, and whether a placement is in force."""

    def plan(history: Tensor, live: Placement | None) -> Placement:
        seen.append((history[:, 0, 0].tolist(), live is not None))
        return gives

    return plan


def test_a_layer_a_step_then_the_interval() -> None:
    seen: list[tuple[list[float], bool]] = []
    judged = list(replay_steps(steps(14), START, recording(seen), Rules(interval=2, keep=4)))
    assert [step.written for step in judged] == [0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert seen == [
        ([1, 2, 3], True),
        ([6, 7, 8, 9], True),
    ]  # after 2 + 1 steps; after 2 + 1 from step 6, when all were
    assert [step.planned > 0 for step in judged].count(True) == 2


def test_a_plan_that_changes_nothing_takes_no_step() -> None:
    seen: list[tuple[list[float], bool]] = []
    planner = Planner(TOPOLOGY, 3, 4, policy="steady", backend="reference")

    def plan(history: Tensor, live: Placement | None) -> Placement:
        seen.append((history[:, 0, 0].tolist(), live is not None))
        return planner(history, previous=live, price=1e9)

    judged = list(replay_steps(steps(9), START, plan, Rules(interval=2)))
    assert not any(step.written for step in judged)
    assert [len(history) for history, _ in seen] == [3, 6, 9]


@pytest.mark.parametrize(
    ("layer_steps", "written"), [(2, [0, 2, 0, 2, 0, 2]), (0.5, [4, 2, 0]), (1.5, [0, 2, 2, 0, 2])]
)
def test_layers_may_take_longer_or_come_together(layer_steps: float, written: list[int]) -> None:
    judged = replay_steps(steps(3 + len(written)), START, recording([]), Rules(interval=2, layer_steps=layer_steps))
    assert [step.written for step in judged] == [0, 0, 0, *written]


def test_windows_without_a_placement_at_first() -> None:
    """The first window is only recorded; each later one is judged by the plan on all before it."""
    seen: list[tuple[list[float], bool]] = []
    judged = list(replay_steps(steps(9), None, recording(seen), Rules(interval=3, layer_steps=0)))
    assert len(judged) == 6
    assert seen == [([1, 2, 3], False), (list(range(1, 7)), True), (list(range(1, 10)), True)]
    assert not any(step.written for step in judged)


def test_judged_by_the_placement_in_force() -> None:
    loads = torch.tensor([[3.0, 1.0, 1.0, 1.0]] * 3)
    judged = list(replay_steps([loads] * 8, START, recording([]), Rules(interval=1)))
    assert judged[0].peak.tolist() == [4, 4, 4]
    assert judged[0].mean.tolist() == [3, 3, 3]
    summary = Summary.of(judged)
    assert (summary.steps, summary.layer_steps, summary.written) == (8, 24, 6)
    assert summary.peak_over_mean == pytest.approx(4 / 3)
    assert summary.balancedness == pytest.approx(3 / 4)
    assert len(summary.plan_seconds) == 2
    zero = list(replay_steps([torch.zeros(3, 4)], START, recording([]), Rules(interval=1, least_load=1)))
    assert zero[0].peak.tolist() == [2, 2, 2]
    assert Summary.of(replay_steps([torch.zeros(3, 4)], START, recording([]), Rules(interval=1))).peak_over_mean == 1
    assert Summary().balancedness == Summary().peak_over_mean == 1


@pytest.mark.parametrize(("field", "value"), [("interval", 0), ("keep", 0), ("layer_steps", -1), ("least_load", -0.5)])
def test_rules_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Rules\.{field}={value} must be at least"):
        Rules(**{"interval": 1, field: value})  # type: ignore[arg-type]


def test_drawn_steps() -> None:
    first, again = (torch.stack(list(serving_steps(40, 2, 64, seed=3))) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (40, 2, 64)
    assert first.dtype == torch.int64
    assert first.sum(2).double().mean() == pytest.approx(3200 * 8, rel=0.01)
    skew = (first.double().mean(0) + 1).log().std(1)
    assert ((skew > 0.45) & (skew < 0.85)).all()
    changed = torch.stack(list(serving_steps(1300, 1, 64, mixed=True, seed=3))).double()
    before, after, later = (changed[at : at + 50].mean((0, 1)) for at in (1100, 1150, 1210))
    assert (before - after).abs().sum() < 0.3 * (before - later).abs().sum()
    with pytest.raises(ValueError, match="num_experts=0 must be at least 1"):
        next(serving_steps(1, 1, 0))


def next_window(series: list[Tensor], policy: str, backend: str) -> tuple[float, float]:
    """Per-step balancedness of the windows of 16 steps after each plan, and slots written a layer and plan."""
    topology, (layers, experts) = Topology(num_replicas=80, num_gpus=16), series[0].shape
    planner = Planner(topology, layers, experts, policy=policy, backend=backend)
    steady = policy == "steady"
    plan: Plan = lambda history, live: planner(history, previous=live if steady else None)  # noqa: E731
    summary = Summary.of(replay_steps(series, None, plan, Rules(interval=16, layer_steps=0)))
    return summary.balancedness, summary.written / layers / (len(series) // 16 - 1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_steady_is_better_on_the_next_window_with_few_slots(backend: str) -> None:
    series = [step.float() for step in serving_steps(96, 4, 64, tokens_per_step=128, top_k=6, seed=1)]
    levelled, written = next_window(series, "steady", backend)
    other, rewritten = next_window(series, "balanced", backend)
    assert levelled > other
    assert written < 20
    assert rewritten > 60


@pytest.mark.parametrize(("trace", "least"), [("law", 0.76), ("intent", 0.83), ("summary", 0.72)])
def test_floors_on_recorded_traffic(trace: str, least: float) -> None:
    """Chunks of 128 tokens, windows of 16 steps, all history."""
    folder = os.environ.get("EPLB_TRACES")
    if not folder or not (Path(folder) / f"{trace}.npz").is_file():
        pytest.skip("EPLB_TRACES names no folder with this trace")
    recording = read_loads(Path(folder) / f"{trace}.npz", kind="topk_ids")
    series = [recording.loads(at, at + 128).float() for at in range(0, recording.length - 127, 128)]
    levelled, written = next_window(series, "steady", "cpu")
    assert levelled >= least
    assert written <= 20
