"""What is kept of judged steps: splits, tallies, costs, foresight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Planner, Topology, plan
from eplb_triton.cli.replay_study import FORESIGHT, KEPT, UNPLANNED, Outcome, Setting, replay_all
from eplb_triton.formats import StepStream
from eplb_triton.replay import (
    EVEN,
    IN_STEP,
    LAST_STEPS,
    SPLITS,
    Costs,
    Foresight,
    Rules,
    Step,
    Summary,
    Tally,
    judged,
    layer_seconds_of,
    replay_steps,
)
from eplb_triton.synthetic import serving_steps

TOPOLOGY = Topology(num_replicas=20, num_gpus=4)
COSTS = Costs(88e6, 900e9, 1e-4)


def stream_of(steps: Sequence[Tensor] | Tensor) -> StepStream:
    """Steps in memory."""
    array = torch.stack(list(steps)).numpy()
    return StepStream((), array.shape[1], array.shape[2], len(array), lambda: iter([array]))


def drawn(num_steps: int, seed: int = 0) -> list[Tensor]:
    return list(serving_steps(num_steps, 2, 16, tokens_per_step=200, top_k=2, seed=seed))


def placement(seed: int = 0) -> Placement:
    return Planner(TOPOLOGY, 2, 16, policy="balanced")(torch.stack(drawn(8, seed)))


def test_splits_lose_no_token_and_the_one_of_the_step_is_never_worse() -> None:
    steps = drawn(40)
    for number, step in enumerate(judged(steps, placement(), SPLITS)):
        assert list(step.gpu_loads) == list(SPLITS)
        for loads in step.gpu_loads.values():
            assert loads.sum(1).tolist() == pytest.approx(steps[number].sum(1).tolist())
        assert (step.gpu_loads[IN_STEP].amax(1) <= step.gpu_loads[EVEN].amax(1).ceil()).all()
        assert torch.equal(step.gpu_loads[LAST_STEPS], step.gpu_loads[EVEN]) == (number < 16)


def test_a_table_helps_on_the_steps_that_it_was_made_for() -> None:
    constant = [drawn(1)[0]] * 20
    first, *_, last = judged(constant, placement(3), SPLITS)
    assert torch.equal(first.gpu_loads[LAST_STEPS], first.gpu_loads[EVEN])
    assert (last.gpu_loads[LAST_STEPS].amax(1) <= last.gpu_loads[EVEN].amax(1) + 1e-9).all()
    assert float(last.gpu_loads[LAST_STEPS].amax()) < float(last.gpu_loads[EVEN].amax())


def test_a_table_never_points_at_an_expert_that_has_moved() -> None:
    """Layers that change between two tables get theirs at once; no token may fall on a slot of another expert."""
    other = placement(5)
    steps = drawn(60)
    for number, step in enumerate(
        replay_steps(steps, placement(), lambda history, live: other, Rules(3, layer_steps=1), SPLITS)
    ):
        assert step.gpu_loads[LAST_STEPS].sum(1).tolist() == pytest.approx(steps[number].sum(1).tolist())


def test_splits_must_be_known_and_begin_with_the_even_one() -> None:
    for names in ((), (IN_STEP,), (EVEN, "by lot")):
        with pytest.raises(ValueError, match="must be 'even', then any of"):
            next(judged(drawn(1), placement(), names))


def test_loads_of_more_tokens_than_an_int32_are_split_as_floats() -> None:
    (step,) = judged([torch.full((2, 16), 2**28)], placement(), (EVEN, IN_STEP))
    ratio = [loads.amax(1) / loads.mean(1) for loads in step.gpu_loads.values()]
    assert (ratio[1] <= ratio[0] + 1e-6).all()


def test_a_tally_is_what_numpy_finds() -> None:
    loads = torch.rand(50, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loads[7, 1] = 0
    tally = Tally(50, 3, 4, heat=True, buckets=10)
    for step in loads:
        tally.add(step)
    relative = np.where(loads.mean(2, keepdim=True) > 0, loads / loads.mean(2, keepdim=True).clamp(min=1e-9), 1.0)
    ratio = relative.max(2)
    assert tally.mean == pytest.approx(ratio.mean())
    assert tally.layers == pytest.approx(ratio.mean(0))
    assert tally.over_time == pytest.approx(ratio.reshape(10, 5, 3).mean((1, 2)))
    assert tally.heat_of(2) == pytest.approx(relative[:, 2].reshape(10, 5, 4).mean(1).T, rel=1e-5)
    for share in (0.5, 0.99, 1.0):
        exact = np.quantile(ratio, share, method="inverted_cdf")
        assert exact - 1e-9 <= tally.percentile(share) <= exact + 1 / 512
    assert Tally(0, 3, 4).mean == Tally(0, 3, 4).percentile(0.99) == 1


def test_a_tally_may_skip_the_beginning_which_only_the_curves_show() -> None:
    loads = torch.tensor([[[3.0, 1.0]]] * 4 + [[[1.0, 1.0]]] * 6)
    tally = Tally(10, 1, 2, skip=4, buckets=10)
    for step in loads:
        tally.add(step)
    assert (tally.steps, tally.judged, tally.mean, tally.percentile(1.0)) == (10, 6, 1.0, 1.0)
    assert tally.over_time.tolist() == [1.5] * 4 + [1.0] * 6


def test_a_tally_does_not_grow() -> None:
    small, large = (Tally(steps, 3, 4, heat=True) for steps in (1000, 10**9))
    for name, value in vars(small).items():
        assert getattr(value, "shape", None) == getattr(getattr(large, name), "shape", None)


def test_costs() -> None:
    assert COSTS.moving(900) == pytest.approx(900 * 88e6 / 900e9)
    assert COSTS.serving(3.0) == pytest.approx(3e-4)
    assert COSTS.price(2000) == pytest.approx((88e6 / 900e9) / (1e-4 * 4000))
    assert COSTS.paid_back(900, 0.5) == pytest.approx(0.088 / 5e-5)
    assert COSTS.paid_back(1, 0.0) == math.inf
    assert COSTS.paid_back(0, 0.0) == 0
    assert layer_seconds_of(800, 88_080_384) == pytest.approx(176e-6, rel=0.01)
    with pytest.raises(ValueError, match="bandwidth=0"):
        Costs(1, 0, 1)


def test_foresight_plans_for_the_steps_that_it_is_judged_by() -> None:
    steps, seen = drawn(10), []

    def plan(ahead: Tensor, live: Placement | None) -> Placement:
        seen.append(ahead)
        return placement(len(seen))

    server = Foresight(placement(), plan, 4, SPLITS)
    judgements: list[list[Step]] = [server.serve(step) for step in steps]
    judgements.append(server.finish())
    assert [len(found) for found in judgements] == [0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 2]
    assert torch.equal(torch.cat(seen), torch.stack(steps).float())
    assert server.finish() == []
    for found, number in zip(judgements[3], range(4), strict=True):
        assert torch.equal(found.gpu_loads[EVEN], placement(1).gpu_loads(steps[number]))


def outcomes_of(steps: Sequence[Tensor], *names: str, interval: int = 20) -> dict[str, Outcome]:
    setting = Setting(TOPOLOGY, interval, COSTS, layer_steps=0)
    found = replay_all(stream_of(steps), [(setting, name) for name in names], (EVEN,), lambda: None)
    return {outcome.name: outcome for outcome in found}


def test_on_constant_loads_one_plan_is_all_there_is_to_gain() -> None:
    policies = ("deepseek", "balanced", "steady")
    names = [*policies, *(policy + KEPT for policy in policies)]
    found = outcomes_of([drawn(1)[0]] * 100, UNPLANNED, FORESIGHT, *names)
    for policy in policies:
        kept, again = found[policy + KEPT], found[policy]
        assert again.seconds() == kept.seconds() < found[UNPLANNED].seconds()
        assert (kept.plans, again.plans, again.written) == (1, 5, kept.written)
    assert found[FORESIGHT].tallies[EVEN].mean <= found["steady"].tallies[EVEN].mean


def test_foresight_is_above_what_a_deployment_can_reach() -> None:
    found = outcomes_of(drawn(100), UNPLANNED, "deepseek", "balanced", "steady", FORESIGHT)
    others = [outcome.tallies[EVEN].mean for name, outcome in found.items() if name != FORESIGHT]
    assert found[FORESIGHT].tallies[EVEN].mean < min(others)


def test_shuffled_in_time_the_gain_of_coincidences_vanishes() -> None:
    """Experts that are hot in the same steps: what `steady` gains over `balanced` by keeping them apart is gone when
    each expert's loads are shuffled on their own, so that the same loads no longer coincide."""
    random = np.random.default_rng(0)
    hot = random.permutation(32) % 8 == random.integers(0, 8, (400, 1))
    loads = torch.from_numpy(random.poisson(20 + 180 * hot)).unsqueeze(1)
    shuffled = torch.stack([loads[torch.from_numpy(random.permutation(400)), :, expert] for expert in range(32)], 2)
    topology, gains = Topology(num_replicas=40, num_gpus=8), []
    for series in (loads, shuffled):
        made = [plan(series[:200], topology, policy) for policy in ("balanced", "steady")]
        anew, steady = (Summary.of(judged(series[200:], placement)).peak_over_mean for placement in made)
        gains.append(1 - steady / anew)
    assert gains[0] > 0.15
    assert abs(gains[1]) < 0.03


def test_a_summary_is_by_the_even_split() -> None:
    found = list(judged(drawn(5), placement(), SPLITS))
    assert Summary.of(found).par == pytest.approx(Summary.of(judged(drawn(5), placement())).par)
