"""The numbers around replanning: the price of a slot, the order of layers, the deviations that count, its fields."""

from __future__ import annotations

import math

import pytest
import torch

from eplb_triton.policy import POLICIES, Policy, Replan
from eplb_triton.replans import DEFAULT_PRICE, Changes, deployment_order, replan_price, score_z

NONE = math.nan


def test_the_default_price_is_that_of_a_bf16_expert() -> None:
    price = replan_price(88_080_384, 900e9, 0.17e-3, 64)
    assert price == replan_price(88_080_384, 900e9, 0.17e-3, 512)  # 1024 steps are served at least
    assert replan_price(88_080_384, 900e9, 0.17e-3, 1024) == price / 2
    assert round(price / 2, 4) == DEFAULT_PRICE  # 2.8e-4, rounded
    assert replan_price(44_040_192, 900e9, 0.17e-3, 64) == price / 2
    assert replan_price(0, 900e9, 0.17e-3, 64) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1, 1, 1, 1), "slot_bytes=-1 must be at least 0 and finite"),
        ((1, 0, 1, 1), "bandwidth=0 must be above 0 and finite"),
        ((1, 1, math.nan, 1), "layer_seconds=nan must be above 0 and finite"),
        ((1, 1, 1, 0), "interval=0 must be above 0 and finite"),
        ((1, math.inf, 1, 1), "bandwidth=inf must be above 0 and finite"),
    ],
)
def test_prices_that_are_none(arguments: tuple[float, float, float, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replan_price(*arguments)


@pytest.mark.parametrize(
    ("before", "after", "written", "fills", "order"),
    [
        ([1.5, 1.9, 1.2], [1.2, 1.3, 1.2], [3, 4, 0], [0, 0, 0], [1, 0, -1]),
        ([1.5, 1.5, 1.6], [1.25, 1.25, 1.35], [1, 1, 1], [0, 0, 0], [0, 1, 2]),  # ties: the lowest layer
        ([1.5, 1.5, 1.6], [1.5, 1.4, 1.6], [0, 1, 0], [2, 0, 1], [1, 0, 2]),  # fills alone: last
        ([NONE, NONE], [1.1, 1.2], [8, 8], [0, 0], [0, 1]),  # nothing was in force
        ([1.1, NONE], [1.1, NONE], [0, 0], [0, 0], [-1, -1]),  # nothing changed; a layer that was refused
        ([1.3, 1.2], [1.3, 1.1], [2, 2], [1, 0], [1, 0]),  # written, though it gains nothing beyond rounding
    ],
)
def test_order_of_deployment(
    before: list[float], after: list[float], written: list[int], fills: list[int], order: list[int]
) -> None:
    was, becomes = (torch.tensor(peaks, dtype=torch.float64) for peaks in (before, after))
    status = torch.zeros(len(order), dtype=torch.int32)
    got = deployment_order(Changes(torch.tensor(written), torch.tensor(fills), was, becomes, status))
    assert got.dtype == torch.int64
    assert got.tolist() == order


def test_deviations_that_count() -> None:
    """What the largest of D normal variables exceeds with probability 1 / D, in units of 2**-16."""
    assert score_z(1) == score_z(2) == 0
    for num_gpus in (3, 16, 32, 144):
        z = score_z(num_gpus)
        assert (z * 65536).is_integer()
        assert math.erfc(z / math.sqrt(2)) / 2 == pytest.approx(1 / num_gpus, rel=1e-3)
    assert score_z(32, 1.5) == 1.5
    assert score_z(32, 1.5 / 65536) == 2 / 65536  # half to even


def test_fields_of_replanning() -> None:
    assert POLICIES["steady"].replan == Replan(samples=32, moves=64, fresh_moves=128, norm=16, z=None)
    assert all(policy.replan is None for name, policy in POLICIES.items() if name != "steady")


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 0), ("samples", 33), ("moves", 0), ("fresh_moves", -1), ("norm", 12), ("z", -0.5), ("z", math.nan)],
)
def test_fields_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Replan\.{field}={value} must be"):
        Replan(**{field: value})  # type: ignore[arg-type]


def test_replanning_has_one_fresh_plan() -> None:
    with pytest.raises(ValueError, match=r"Policy\.counts='dhondt' must be 'capped' with replan=Replan\("):
        Policy("mine", group_pack="partition", gpu_pack="blocks", replan=Replan())
