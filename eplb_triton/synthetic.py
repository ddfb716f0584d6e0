"""Every drawn load: series that look like the expert counts of a large mixture-of-experts model, and awkward ones.

The same seed and arguments give the same loads with NumPy 1.26 to 2.5: tests hold digests of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Family = Literal["drift", "zipf", "hot-group", "idle", "ties"]
TIE_FREE: tuple[Family, ...] = ("drift", "zipf", "hot-group")
"""Families in which no two experts of a layer have equal load."""
TOKENS_PER_EXPERT = 2048
"""Mean load of `load_windows`: 64 Ki tokens, 8 experts each, over 256 experts."""
DRIFT = 0.02
"""Share of the variance of the logarithm of the popularity that is new in each window or step."""
_GROUPS = 8
_BURST_TOPICS = 16
_TOPICS = 6  # of `serving_steps`
_BURST_MEMORY = 0.75
_FRACTION_BITS = 24  # of numbers that are summed: 2**38 tokens fit an int64


def lognormal_series(
    num_steps: int = 8,
    num_layers: int = 58,
    num_experts: int = 256,
    *,
    tokens_per_step: int = 65_536,
    top_k: int = 8,
    sigma: tuple[float, float] = (0.4, 1.1),
    drift: float = DRIFT,
    burst: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Token counts of every expert, step by step; the defaults are shaped like DeepSeek-V3.

    An expert's popularity is log-normal. How skewed it is differs by layer: sigma of the logarithm is drawn evenly
    from `sigma`. From step to step the logarithm drifts (a stationary autoregressive walk), so a plan made on one
    step fits the next ones less and less. Counts are drawn by `draw_counts`: every layer of a step sums to
    tokens_per_step * top_k.

    Args:
        num_steps: T.
        num_layers: L, mixture-of-experts layers.
        num_experts: E.
        tokens_per_step: tokens routed in a step.
        top_k: experts a token is sent to.
        sigma: least and largest standard deviation of the logarithm of the popularity in a layer.
        drift: share of the logarithm's variance that is new in each step, 0 (frozen) to 1 (no memory).
        burst: standard deviation of what comes on top of the logarithm for some steps, for the experts of a topic
            together: each expert has one of 16 topics of its layer, and a topic keeps three quarters of its strength
            from step to step.
        seed: the same seed and arguments give the same counts.

    Returns:
        [T, L, E] int64, tokens.

    Raises:
        ValueError: a count below 1, a `sigma` that is negative or not ascending, a `drift` outside 0..1, a `burst` that
            is negative.
    """
    counts = {"num_steps": num_steps, "num_layers": num_layers, "num_experts": num_experts}
    for name, value in {**counts, "tokens_per_step": tokens_per_step, "top_k": top_k}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= sigma[0] <= sigma[1]:
        raise ValueError(f"sigma={sigma} must be two ascending numbers of at least 0")
    if not 0 <= drift <= 1:
        raise ValueError(f"drift={drift} must be 0 to 1")
    if not burst >= 0:
        raise ValueError(f"burst={burst} must be at least 0")
    random = np.random.default_rng(seed)
    topics = np.random.default_rng((seed, 1))  # of its own: without bursts the rest is as it is with them
    topic = topics.integers(_BURST_TOPICS, size=(num_layers, num_experts))
    strength = topics.standard_normal((num_layers, _BURST_TOPICS))  # unit variance at every step
    skew = random.uniform(*sigma, size=(num_layers, 1))  # [L, 1]
    walk = random.standard_normal((num_layers, num_experts))  # [L, E], unit variance at every step
    series = np.empty((num_steps, num_layers, num_experts), dtype=np.int64)
    for step in range(num_steps):
        if step:
            fresh = random.standard_normal(walk.shape)
            walk = np.sqrt(1 - drift) * walk + np.sqrt(drift) * fresh
            fresh = topics.standard_normal(strength.shape)
            strength = _BURST_MEMORY * strength + np.sqrt(1 - _BURST_MEMORY**2) * fresh
        hot = burst * np.take_along_axis(strength, topic, axis=1)
        series[step] = draw_counts(random, tokens_per_step * top_k, np.exp(skew * walk + hot))
    return torch.from_numpy(series)


def draw_counts(random: np.random.Generator, total: int, popularity: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts of every expert, as of `total` draws with replacement: means, variances and correlations of a multinomial,
    where means are a few tokens or more.

    Normal draws, corrected to their sum and rounded, take the place of `Generator.multinomial`, which draws otherwise
    from NumPy 2.5 on. Sums are of integers, so that no order of addition shows; exp, whose last bit depends on the
    processor, is rounded to `popularity`'s 24 bits behind the point.

    Args:
        random: what to draw from: one normal number a count.
        total: sum of every row.
        popularity: [..., E], above 0, in any unit about 1.

    Returns:
        [..., E], at least 0. Ties of rounding: the lower expert first.
    """
    chance = np.maximum(np.rint(popularity * 2.0**_FRACTION_BITS), 1)  # whole numbers, exact sums
    chance /= chance.astype(np.int64).sum(axis=-1, keepdims=True)
    mean = total * chance
    fixed = _fixed(mean + np.sqrt(mean) * random.standard_normal(popularity.shape))
    short = (total << _FRACTION_BITS) - fixed.sum(axis=-1, keepdims=True)
    fixed = np.maximum(fixed + np.rint(short * chance).astype(np.int64), 0)
    counts: NDArray[np.int64] = fixed >> _FRACTION_BITS
    while (short := total - counts.sum(axis=-1, keepdims=True)).any():
        # a token more where most was cut off, or one less where there are most
        by = np.where(short > 0, fixed - (counts << _FRACTION_BITS), counts)
        place = np.argsort(np.argsort(-by, axis=-1, kind="stable"), axis=-1, kind="stable")
        counts = np.maximum(counts + np.where(place < np.abs(short), np.sign(short), 0), 0)
    return counts


def _fixed(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values * 2.0**_FRACTION_BITS).astype(np.int64)


def serving_steps(
    num_steps: int = 6144,
    num_layers: int = 6,
    num_experts: int = 256,
    *,
    mixed: bool = False,
    tokens_per_step: int = 3200,
    top_k: int = 8,
    seed: int = 0,
) -> Iterator[torch.Tensor]:
    """Token counts of every expert, one serving step after the other, as a large deployment sees them.

    The logarithm of an expert's popularity is the sum of what stays (standard deviation 0.61), a slow walk (0.14,
    correlated over 650 steps), 6 topics (over 60 steps) that a quarter of the experts each takes part in, and bursts of
    its own (over 15 steps), strong for few experts. Counts are Poisson. The figures were fitted to what was published
    of one planner on traces of DeepSeek-R1.

    Args:
        num_steps: T.
        num_layers: L, mixture-of-experts layers.
        num_experts: E.
        mixed: traffic that changes: half of the variance of what stays is drawn anew every 1,200 steps, and there is
            more of it.
        tokens_per_step: tokens routed in a step.
        top_k: experts a token is sent to.
        seed: the same seed and arguments give the same counts.

    Yields:
        [L, E] int64, tokens.

    Raises:
        ValueError: a count below 1.
    """
    counts = {"num_steps": num_steps, "num_layers": num_layers, "num_experts": num_experts}
    for name, value in {**counts, "tokens_per_step": tokens_per_step, "top_k": top_k}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    random = np.random.default_rng(seed)
    shape, topics = (num_layers, num_experts), (num_layers, _TOPICS)
    base, slow, topic, burst = (random.standard_normal(size) for size in (shape, shape, topics, shape))
    loadings = 2 * random.standard_normal((*topics, num_experts)) * (random.random((*topics, num_experts)) < 0.25)
    bursts = np.minimum(0.026 * np.exp(1.22 * random.standard_normal(shape)), 0.8)
    for step in range(num_steps):
        if step:
            slow, topic, burst = (_walk(random, value, over) for value, over in ((slow, 650), (topic, 60), (burst, 15)))
            if mixed and step % 1200 == 0:
                base = np.sqrt(0.5) * (base + random.standard_normal(shape))
        logarithm = 0.61 * (1.25 if mixed else 1.0) * base + 0.14 * slow + bursts * burst
        logarithm += 0.02 * np.einsum("lt,lte->le", topic, loadings)
        intensity = np.exp(logarithm)
        intensity *= tokens_per_step * top_k / intensity.sum(axis=1, keepdims=True)
        yield torch.from_numpy(random.poisson(intensity))


def _walk(random: np.random.Generator, value: NDArray[np.float64], over: float) -> NDArray[np.float64]:
    """The next step of a walk of variance 1 that is correlated over so many steps."""
    keep = np.exp(-1 / over)
    walked: NDArray[np.float64] = keep * value + np.sqrt(1 - keep * keep) * random.standard_normal(value.shape)
    return walked


def lognormal_loads(num_layers: int, num_experts: int, *, sigma: float = 0.8, seed: int = 0) -> torch.Tensor:
    """Loads [num_layers, num_experts] float32 without order or scale: the logarithm is normal, of deviation `sigma`."""
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, sigma, (num_layers, num_experts))).float()


def load_windows(family: Family, num_windows: int, num_layers: int, num_experts: int, *, seed: int = 0) -> torch.Tensor:
    """Loads of a window after the other, of a mean of `TOKENS_PER_EXPERT`; the popularity drifts from one to the next.

    Args:
        family: `drift`, log-normal, how uneven differs by layer; `zipf`; `hot-group`, one of eight groups of experts is
            four times as popular; `idle`, as `drift`, 60 % of the experts get nothing; `ties`, as `drift`, 8 whole
            tokens an expert, so that most loads tie.
        num_windows: T.
        num_layers: L.
        num_experts: E.
        seed: the same seed and arguments give the same loads.

    Returns:
        [T, L, E] float32, tokens. In the families of `TIE_FREE` no two experts of a layer have equal load.

    Raises:
        ValueError: `family` is not one of those.
    """
    if family not in get_args(Family):
        raise ValueError(f"family={family!r} must be one of {', '.join(get_args(Family))}")
    random = np.random.default_rng(seed)
    popularity = np.stack(_popularities(random, family, num_windows, (num_layers, num_experts)))
    popularity /= popularity.sum(axis=2, keepdims=True)
    if family == "ties":
        return torch.from_numpy(draw_counts(random, 8 * num_experts, popularity * num_experts)).float()
    loads = (popularity * num_experts * TOKENS_PER_EXPERT).astype(np.float32)
    if family == "idle":
        loads[:, random.random((num_layers, num_experts)) < 0.6] = 0
    return torch.from_numpy(_without_ties(loads) if family in TIE_FREE else loads)


def _popularities(
    random: np.random.Generator, family: Family, num_windows: int, shape: tuple[int, int]
) -> list[Floats]:
    """Popularity [L, E] of every expert, a window after the other; its logarithm walks, keeping its variance."""
    layers, experts = shape
    base, skew = np.zeros(shape), np.full((layers, 1), 0.3)
    if family == "zipf":
        base = random.permuted(np.tile(-1.1 * np.log(np.arange(1, experts + 1)), (layers, 1)), axis=1)
    elif family == "hot-group":
        group = np.arange(experts) * _GROUPS // experts
        base = np.where(group == random.integers(_GROUPS, size=(layers, 1)), np.log(4.0), 0.0)
    else:
        skew = random.uniform(0.4, 1.1, size=(layers, 1))  # how uneven a layer is differs by layer
    walk = random.standard_normal(shape)
    windows = []
    for _ in range(num_windows):
        windows.append(np.exp(base + skew * walk))
        walk = np.sqrt(1 - DRIFT) * walk + np.sqrt(DRIFT) * random.standard_normal(shape)
    return windows


def _without_ties(loads: NDArray[np.float32]) -> NDArray[np.float32]:
    """`loads` with every load of a layer raised to the next float32 above the one below it where they tie."""
    order = np.argsort(loads, axis=-1, kind="stable")
    ascending = np.take_along_axis(loads, order, axis=-1)
    for expert in range(1, loads.shape[-1]):
        above = np.nextafter(ascending[..., expert - 1], np.float32(np.inf))
        ascending[..., expert] = np.maximum(ascending[..., expert], above)
    distinct = np.empty_like(loads)
    np.put_along_axis(distinct, order, ascending, axis=-1)
    return distinct


def _one_outlier(random: np.random.Generator, shape: tuple[int, int]) -> NDArray[Any]:
    loads = random.integers(1, 4, shape).astype(np.float64)
    loads[:, random.integers(shape[1])] = 1e12
    return loads


def _zipf(random: np.random.Generator, shape: tuple[int, int]) -> NDArray[Any]:
    return random.permuted(np.broadcast_to(1e6 / np.arange(1, shape[1] + 1), shape), axis=1)


AWKWARD: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]] = {
    "continuous": lambda random, shape: random.lognormal(8.0, 1.0, shape),
    "ties": lambda random, shape: random.integers(0, 4, shape),
    "zeros": lambda random, shape: np.zeros(shape),
    "mostly idle": lambda random, shape: random.integers(1, 100, shape) * (random.random(shape) < 0.1),
    "equal": lambda random, shape: np.full(shape, 7.0),
    "outlier": _one_outlier,
    "zipf": _zipf,
    "tiny": lambda random, shape: random.random(shape) * 1e-30,
    "denormal": lambda random, shape: random.integers(0, 50, shape) * 1.401298464324817e-45,
    "huge": lambda random, shape: random.random(shape) * 1e30,
}
"""What planners go wrong on: ties by the hundred, idle experts, outliers, what is nearly not a number."""


def awkward_loads(family: str, seed: int, layers: int, experts: int) -> torch.Tensor:
    """Loads [layers, experts] float32 of one of the families of `AWKWARD`, the same from the same seed.

    Raises:
        ValueError: no family has that name.
    """
    if family not in AWKWARD:
        raise ValueError(f"family={family!r} is unknown, must be one of {', '.join(AWKWARD)}")
    values = AWKWARD[family](np.random.default_rng(seed), (layers, experts))
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32)
