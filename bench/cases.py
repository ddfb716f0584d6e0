"""The frozen table of cases: a cluster, a model and a family of loads each; and their loads, a few windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast, get_args

import torch

from eplb_triton import Topology
from eplb_triton.formats import read_loads
from eplb_triton.synthetic import TIE_FREE, Family, load_windows
from eplb_triton.testing.models import MODELS

WINDOWS = 4
"""Windows of a series: three are planned, and each is judged on the next one too."""
TRACE_WINDOW = 2000
"""Tokens of a window of a recording."""
FAMILIES = (*get_args(Family), "recorded")


class MissingTraceError(Exception):
    """A recorded case without its recording."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Args:
        name: what `--cases` and the report call it.
        layers: L.
        experts: E.
        topology: P, G, N, D.
        family: how its loads are drawn, see `eplb_triton.synthetic.load_windows`; or `recorded`.
        seed: of the loads; for recorded loads nothing is drawn.
        trace: stem of the recording, for `recorded`.
    """

    name: str
    layers: int
    experts: int
    topology: Topology
    family: str
    seed: int = 0
    trace: str = ""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} must be one of {', '.join(FAMILIES)}")
        if (self.family == "recorded") != bool(self.trace):
            raise ValueError(f"trace={self.trace!r} must name a recording exactly if family is 'recorded'")
        self.topology.check_experts(self.experts)

    @property
    def tie_free(self) -> bool:
        """Whether no two experts of a layer have equal load."""
        return self.family in TIE_FREE


def _case(name: str, family: str, seed: int, model: str = "") -> Case:
    return Case(name, *MODELS[model or name], family, seed)


CASES: tuple[Case, ...] = (
    _case("v3-hierarchical", "drift", 1),
    _case("v3-global", "drift", 1),
    _case("v3-144-gpus", "drift", 2),
    _case("v3-zipf", "zipf", 3, "v3-hierarchical"),
    _case("v3-hot-group", "hot-group", 4, "v3-hierarchical"),
    _case("v3-idle", "idle", 5, "v3-hierarchical"),
    _case("v3-ties", "ties", 6, "v3-hierarchical"),
    _case("kimi-k2", "drift", 7),
    _case("qwen3", "drift", 8),
    _case("kimi-k3-like", "drift", 9),
    _case("512-to-1024", "drift", 10),
    _case("1024-to-2048", "drift", 11),
    *(
        Case(f"trace-{trace}", 26, 64, Topology(num_replicas=80, num_gpus=16), "recorded", trace=trace)
        for trace in ("intent", "law", "summary")
    ),
)


def select(patterns: str, names: Iterable[str], what: str) -> list[str]:
    """Names that match one of the comma-separated glob patterns, in their own order; all of them for "".

    Raises:
        ValueError: a pattern matches none.
    """
    names = list(names)
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{what} {pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)]


def series(case: Case, traces: Path | None = None) -> torch.Tensor:
    """Loads [T, L, E] float32 of the case, T = `WINDOWS`. Results carry a digest of them.

    Raises:
        MissingTraceError: a recorded case, and no such file in `traces`, or a file of another shape.
    """
    if case.family == "recorded":
        return _recorded(case, traces)
    return load_windows(cast(Family, case.family), WINDOWS, case.layers, case.experts, seed=case.seed)


def digest(loads: torch.Tensor) -> str:
    """16 hex digits of SHA-256 over the bytes of the loads."""
    return hashlib.sha256(loads.contiguous().numpy().tobytes()).hexdigest()[:16]


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
