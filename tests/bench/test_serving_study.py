"""The serving simulation: its rules, step by step, and its scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.serving_rules import CASES, LAYERS, Case, price_of, simulate
from bench.studies.serving import ours, scores
from eplb_triton import Placement, Planner
from eplb_triton.replay import Rules, Summary, replay_steps
from eplb_triton.synthetic import serving_steps

SMALL = Case("R1", LAYERS, 32, 8)
"""Every layer stands for itself."""


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """[n, L, E] float32."""
    return torch.stack(list(serving_steps(200, LAYERS, 32, seed=5))).float()


@pytest.mark.parametrize("policy", ["deepseek", "steady"])
def test_as_step_by_step(policy: str, drawn: Tensor) -> None:
    """Where every layer stands for itself: as the replay judges, plans and deploys, one step after the other."""
    plan = ours(policy, SMALL.topology, 32, 1e-3, 40)
    got = simulate(SMALL, drawn, plan, 25)
    summary = Summary.of(replay_steps(list(drawn), SMALL.start, plan, Rules(25, least_load=1)))
    assert got["slots"] == summary.written > 0
    assert got["par"] == pytest.approx(summary.peak_over_mean, rel=1e-12)


def test_layers_that_stand_for_several(drawn: Tensor) -> None:
    """In force in the middle of their steps; the next plan waits for the end of the last ones."""
    case = Case("R1", 4 * LAYERS, 32, 8)
    seen: list[int] = []
    other = Placement.from_phy2log(case.start.phy2log.flip(1), 32, case.topology)

    def plan(history: Tensor, live: Placement | None) -> Placement:
        assert live is not None
        seen.append(len(history))
        return other if torch.equal(live.phy2log, case.start.phy2log) else case.start

    assert simulate(case, drawn[:45], plan, 9)["slots"] == 4 * int((other.phy2log != case.start.phy2log).sum())
    assert seen == [10, 10 + 24 + 10]
    layer = int((other.phy2log[0] != case.start.phy2log[0]).sum())
    for steps, layers in ((11, 0), (12, 1), (15, 1), (16, 2), (31, 5), (32, 6)):
        assert simulate(case, drawn[:steps], plan, 9)["slots"] == 4 * layer * layers


def test_a_plan_that_changes_nothing_takes_no_step(drawn: Tensor) -> None:
    seen: list[int] = []
    planner = Planner(SMALL.topology, LAYERS, 32, policy="steady", backend="reference")

    def plan(history: Tensor, live: Placement | None) -> Placement:
        seen.append(len(history))
        return planner(history, previous=live, price=1e9)

    assert simulate(SMALL, drawn[:31], plan, 9)["slots"] == 0
    assert seen == [10, 20, 30]


def test_the_start() -> None:
    for case in CASES:
        case.start.validate()
    assert CASES[0].start.phy2log[0, :19].tolist() == [*range(8), 7, *range(8, 16), 15, 16]


def test_the_price_from_the_text() -> None:
    """88 MB over 900 GB/s, against the balanced seconds of a layer's step times the steps that a plan serves."""
    seconds = 60 / (6144 * 58)
    for interval, served in ((1024, 2048), (256, 1024), (64, 1024)):
        assert price_of(CASES[0], interval) == pytest.approx(88_080_384 / 900e9 / seconds / served)


def test_scores() -> None:
    """Cases of a kind count alike, or by their times together; kinds count 3, 1 and 3 times."""
    rows = []
    for case in CASES:
        row = {"kind": case.kind, "gpus": case.num_gpus, "seed": 1}
        before = 2.0 * case.num_gpus
        rows.append(row | {"planner": "deepseek", "interval": 1024, "seconds": before})
        after = before if case.kind != "Mix" else before / 2 if case.num_gpus == 256 else before * 2
        rows.append(row | {"planner": "other", "interval": 64, "seconds": after})
    found = scores(rows)
    assert found["deepseek", 1024] == pytest.approx(100)
    assert found["other", 64] == pytest.approx((3 * 100 + (50 + 50 + 50 + 200) / 4 + 3 * 100) / 7)
    mixed = 100 * (32 + 64 + 128 + 256) / (64 + 128 + 256 + 128)
    assert scores(rows, summed=True)["other", 64] == pytest.approx((6 * 100 + mixed) / 7)
