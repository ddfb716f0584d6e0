"""The generator of made-up loads."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_triton.synthetic import (
    AWKWARD,
    TIE_FREE,
    Family,
    awkward_loads,
    draw_counts,
    load_windows,
    lognormal_loads,
    lognormal_series,
    serving_steps,
)


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


def test_bursts_lift_16_topics_of_experts_together() -> None:
    loads = lognormal_series(64, 2, 128, tokens_per_step=10**7, sigma=(0.5, 0.5), drift=0.0, burst=0.5).double().log()
    change = (loads[1:] - loads[:-1]).transpose(0, 1)  # [L, T - 1, E]
    for layer in change:
        alike = torch.corrcoef(layer.T) > 0.9  # experts of a topic rise and fall as one
        assert len({tuple(row) for row in alike.tolist()}) == 16


def test_series_without_bursts_are_as_they_were() -> None:
    assert torch.equal(lognormal_series(3, 2, 8, burst=0.0), lognormal_series(3, 2, 8))
    with pytest.raises(ValueError, match=r"burst=-1 must be at least 0"):
        lognormal_series(1, burst=-1)


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


def test_counts_are_the_same_with_every_numpy() -> None:
    """Recorded with NumPy 2; the same with 1.26 and with 2.5, whose own multinomial draws otherwise."""
    digest = hashlib.sha256(lognormal_series(3).numpy().astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == "49b33cd68d328365"
    assert lognormal_series(2, 1, 8, tokens_per_step=20, top_k=2, seed=5).tolist() == [
        [[3, 4, 3, 10, 8, 3, 0, 9]],
        [[2, 1, 7, 10, 6, 1, 2, 11]],
    ]


def digest(loads: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(loads.numpy()).tobytes()).hexdigest()[:12]


WINDOWS: dict[Family, str] = {
    "drift": "52fa5ed99734",
    "zipf": "9ba7a2c79a17",
    "hot-group": "6373e5757a38",
    "idle": "68be81b6901e",
    "ties": "d90294eb4625",
}


def test_every_draw_is_the_same_with_every_numpy() -> None:
    """Recorded with NumPy 1.26.4, 2.4.6 and 2.5.5, in which exp differs in its last bit."""
    found = {name: digest(load_windows(name, 4, 20, 256, seed=3)) for name in WINDOWS}
    assert found == WINDOWS
    together = torch.cat([awkward_loads(family, seed, 5, 256) for family in AWKWARD for seed in range(3)])
    assert digest(together) == "5ff5475c8fc6"
    assert digest(lognormal_loads(58, 256)) == "9d210e1537b6"
    for mixed, want in ((False, "2955dff38489"), (True, "2b714c6185bc")):
        assert digest(torch.stack(list(serving_steps(64, 2, mixed=mixed, seed=1000)))) == want


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_are_as_their_family_says(family: Family) -> None:
    loads = load_windows(family, 3, 5, 64, seed=1)
    assert loads.shape == (3, 5, 64)
    ascending = loads.sort(dim=2).values
    assert bool((ascending[..., 1:] == ascending[..., :-1]).any()) == (family not in TIE_FREE)
    assert torch.equal(loads[:2], load_windows(family, 2, 5, 64, seed=1)) or family in ("idle", "ties")
    if family == "idle":
        assert 0.5 < float((loads == 0).double().mean()) < 0.7
    if family == "ties":
        assert torch.equal(loads.sum(2), torch.full((3, 5), 8.0 * 64))
    with pytest.raises(ValueError, match="family='steep' must be one of drift, zipf, "):
        load_windows("steep", 1, 1, 8)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    total=st.integers(1, 5000),
    popularity=st.lists(st.floats(2.0**-20, 100), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_counts_add_up_whatever_is_drawn(total: int, popularity: list[float], seed: int) -> None:
    counts = draw_counts(np.random.default_rng(seed), total, np.array([popularity, popularity[::-1]]))
    assert counts.min() >= 0
    assert counts.sum(1).tolist() == [total, total]


def test_counts_vary_like_a_multinomial() -> None:
    popularity = np.array([1.0, 2.0, 3.0, 4.0])
    total, chance = 5000, popularity / popularity.sum()
    counts = draw_counts(np.random.default_rng(1), total, np.tile(popularity, (40_000, 1))).astype(float)
    want = total * (np.diag(chance) - np.outer(chance, chance))
    assert np.abs(counts.mean(0) - total * chance).max() < 1
    assert np.abs(np.cov(counts.T) - want).max() < 0.03 * want.max()
