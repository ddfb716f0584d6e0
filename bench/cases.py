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


def _case(name: str, layers: int, experts: int, counts: tuple[int, int, int, int], family: str, seed: int) -> Case:
    replicas, gpus, groups, nodes = counts
    topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
    return Case(name, layers, experts, topology, family, seed)


_V3_HIERARCHICAL = (288, 32, 8, 4)
"""DeepSeek-V3: 256 experts in 8 groups, 32 redundant, 9 slots on each of 32 GPUs."""

# Topology counts are (P, D, G, N). Where G is no multiple of N, planning is global.
# 1024-to-2048 has 16 layers: the slowest peers take 0.4 to 0.8 s a layer there.
CASES: tuple[Case, ...] = (
    _case("v3-hierarchical", 58, 256, _V3_HIERARCHICAL, "drift", 1),
    _case("v3-global", 58, 256, (288, 32, 1, 1), "drift", 1),
    _case("v3-144-gpus", 58, 256, (288, 144, 8, 18), "drift", 2),
    _case("v3-zipf", 58, 256, _V3_HIERARCHICAL, "zipf", 3),
    _case("v3-hot-group", 58, 256, _V3_HIERARCHICAL, "hot-group", 4),
    _case("v3-idle", 58, 256, _V3_HIERARCHICAL, "idle", 5),
    _case("v3-ties", 58, 256, _V3_HIERARCHICAL, "ties", 6),
    _case("kimi-k2", 60, 384, (448, 64, 1, 8), "drift", 7),
    _case("qwen3", 94, 128, (160, 32, 1, 4), "drift", 8),
    _case("kimi-k3-like", 60, 896, (1024, 128, 1, 16), "drift", 9),
    _case("512-to-1024", 94, 512, (1024, 128, 1, 1), "drift", 10),
    _case("1024-to-2048", 16, 1024, (2048, 1024, 1, 1), "drift", 11),
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
