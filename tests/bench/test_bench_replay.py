"""The serving simulation is a replay: on the same loads and settings the same numbers."""

from __future__ import annotations

import pytest
import torch

from bench import serving_planners
from bench import serving_rules as rules
from eplb_triton.cli.replay_study import Setting, replay_all
from eplb_triton.formats import StepStream
from eplb_triton.replay import EVEN, Costs
from eplb_triton.synthetic import serving_steps

LAYERS = 6


@pytest.mark.parametrize("policy", ["deepseek", "balanced", "steady"])
def test_numbers_of_the_serving_simulation(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loads, rules, price and start: the same PAR, but for the order of sums, and the same slots."""
    monkeypatch.setattr(rules, "STEPS", 90)
    monkeypatch.setattr(serving_planners, "LAST", 40)
    case = rules.Case("R1", LAYERS, 32, 8)
    plan = serving_planners.ours(policy, case.topology, 32, rules.price_of(case, 20), 256)
    steps = [step.float() for step in serving_steps(90, LAYERS, 32, seed=3)]
    simulated = rules.simulate(case, torch.stack(steps), plan, 20)
    costs = Costs(rules.SLOT_BYTES, rules.BANDWIDTH, rules.BALANCED_SECONDS / (90 * LAYERS))
    window = 40 if policy != "steady" else None
    setting = Setting(case.topology, 20, costs, window, start=case.start(LAYERS), least_load=1)
    assert setting.price == rules.price_of(case, 20)
    stream = StepStream((), LAYERS, 32, 90, lambda: iter([torch.stack(steps).numpy()]))
    (outcome,) = replay_all(stream, [(setting, policy)], (EVEN,), lambda: None)
    assert outcome.tallies[EVEN].mean == pytest.approx(simulated["par"], rel=1e-14)
    assert outcome.written == simulated["slots"] > 0
    assert outcome.seconds() == pytest.approx(simulated["seconds"], rel=1e-14)
