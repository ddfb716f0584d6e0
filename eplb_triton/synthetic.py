"""Synthetic loads: a series that looks like the expert counts of a large mixture-of-experts model, from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

_BURST_TOPICS = 16
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
    drift: float = 0.02,
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
        seed: the same seed and arguments give the same counts, with any NumPy from 1.26 on.

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
        seed: the same seed and arguments give the same counts, with one version of NumPy.

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


_TOPICS = 6


def _walk(random: np.random.Generator, value: NDArray[np.float64], over: float) -> NDArray[np.float64]:
    """The next step of a walk of variance 1 that is correlated over so many steps."""
    keep = np.exp(-1 / over)
    walked: NDArray[np.float64] = keep * value + np.sqrt(1 - keep * keep) * random.standard_normal(value.shape)
    return walked
