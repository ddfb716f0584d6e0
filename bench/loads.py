"""The loads of a case: a short series of windows, from a seed or from a recording."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.cases import Case
from eplb_triton.formats import read_loads
from eplb_triton.synthetic import draw_counts

Floats = NDArray[np.float64]

WINDOWS = 4
"""Windows of a series: three are planned, and each is judged on the next one too."""
TOKENS_PER_EXPERT = 2048
"""Mean load: 64 Ki tokens, 8 experts each, over 256 experts."""
DRIFT = 0.02
"""Share of the variance of the logarithm of the popularity that is new in each window."""
TRACE_WINDOW = 2000
"""Tokens of a window of a recording."""
_GROUPS = 8


class MissingTraceError(Exception):
    """A recorded case without its recording."""


def series(case: Case, traces: Path | None = None) -> torch.Tensor:
    """Loads [T, L, E] float32 of the case, T = `WINDOWS`.

    Drawn loads depend on the seed and, in their last bit, on NumPy's exp on this CPU: results carry a digest of them.

    Raises:
        MissingTraceError: a recorded case, and no such file in `traces`, or a file of another shape.
    """
    if case.family == "recorded":
        return _recorded(case, traces)
    random = np.random.default_rng(case.seed)
    popularity = np.stack(_popularities(case, random))  # [T, L, E]
    popularity /= popularity.sum(axis=2, keepdims=True)
    if case.family == "ties":
        counts = draw_counts(
            random, 8 * case.experts, popularity * case.experts
        )  # 8 tokens an expert: most experts tie with others
        return torch.from_numpy(counts.astype(np.float32))
    loads = (popularity * case.experts * TOKENS_PER_EXPERT).astype(np.float32)
    if case.family == "idle":
        idle = random.random((case.layers, case.experts)) < 0.6
        loads[:, idle] = 0
    return torch.from_numpy(_without_ties(loads) if case.tie_free else loads)


def digest(loads: torch.Tensor) -> str:
    """16 hex digits of SHA-256 over the bytes of the loads."""
    return hashlib.sha256(loads.contiguous().numpy().tobytes()).hexdigest()[:16]


def _popularities(case: Case, random: np.random.Generator) -> list[Floats]:
    """Popularity [L, E] of every expert, a window after the other; its logarithm walks, keeping its variance."""
    shape = (case.layers, case.experts)
    base = np.zeros(shape)
    skew: float | Floats = 0.3
    if case.family == "zipf":
        base = random.permuted(np.tile(-1.1 * np.log(np.arange(1, case.experts + 1)), (case.layers, 1)), axis=1)
    elif case.family == "hot-group":
        group = np.arange(case.experts) * _GROUPS // case.experts
        base = np.where(group == random.integers(_GROUPS, size=(case.layers, 1)), np.log(4.0), 0.0)
    else:
        skew = random.uniform(0.4, 1.1, size=(case.layers, 1))  # how uneven a layer is differs by layer
    walk = random.standard_normal(shape)
    windows = []
    for _ in range(WINDOWS):
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


def _recorded(case: Case, traces: Path | None) -> torch.Tensor:
    if traces is None:
        raise MissingTraceError("no folder of routing traces: give --traces or set EPLB_TRACES")
    path = traces / f"{case.trace}.npz"
    if not path.is_file():
        raise MissingTraceError(f"no {path.name} in the folder of routing traces")
    recording = read_loads(path, num_experts=case.experts)
    if recording.num_layers != case.layers or recording.length < WINDOWS * TRACE_WINDOW:
        raise MissingTraceError(
            f"{path.name} has {recording.num_layers} layers, {recording.length} {recording.unit}s; the case needs "
            f"{case.layers} and {WINDOWS * TRACE_WINDOW}"
        )
    windows = [recording.loads(at * TRACE_WINDOW, (at + 1) * TRACE_WINDOW) for at in range(WINDOWS)]
    return torch.stack(windows).to(torch.float32)
