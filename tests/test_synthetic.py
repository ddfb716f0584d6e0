"""The generator of made-up loads."""

from __future__ import annotations

import pytest
import torch

from eplb_triton.synthetic import lognormal_series


def test_the_default_is_shaped_like_deepseek_v3() -> None:
    series = lognormal_series(2)
    assert series.shape == (2, 58, 256)
    assert series.dtype == torch.int64
    assert int(series.min()) >= 0


def test_every_token_goes_to_k_experts_in_every_layer_and_step() -> None:
    series = lognormal_series(3, 5, 32, tokens_per_step=1000, top_k=4)
    assert torch.equal(series.sum(2), torch.full((3, 5), 4000))


def test_a_seed_gives_the_same_counts_and_another_seed_others() -> None:
    first, again, other = (lognormal_series(2, 4, 16, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_longer_series_begins_like_a_shorter_one() -> None:
    assert torch.equal(lognormal_series(5, 4, 16)[:2], lognormal_series(2, 4, 16))


def test_skew_differs_by_layer_within_the_given_range() -> None:
    series = lognormal_series(1, 200, 512, tokens_per_step=10**7, sigma=(0.4, 1.1))
    skew = series[0].double().log().std(1)  # about 3 % of error at 512 experts
    assert 0.35 < float(skew.min()) < 0.5
    assert 1.0 < float(skew.max()) < 1.25


def test_drift_is_slow_and_adds_up() -> None:
    popularity = lognormal_series(30, 20, 256, tokens_per_step=10**7, sigma=(1.0, 1.0)).double().log()

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    near, far = correlation(popularity[0], popularity[1]), correlation(popularity[0], popularity[29])
    assert near == pytest.approx(0.98**0.5, abs=0.01)
    assert far == pytest.approx(0.98**14.5, abs=0.03)


def test_no_drift_freezes_the_popularity() -> None:
    series = lognormal_series(2, 2, 8, tokens_per_step=10**8, drift=0.0).double()
    assert torch.allclose(series[0], series[1], rtol=0.01)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"num_experts": -1}, "num_experts=-1 must be at least 1"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"sigma": (1.0, 0.5)}, "sigma="),
        ({"sigma": (-1.0, 0.5)}, "sigma="),
        ({"drift": 1.5}, "drift=1.5 must be 0 to 1"),
    ],
)
def test_refusals(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lognormal_series(**arguments)  # type: ignore[arg-type]
