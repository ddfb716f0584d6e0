"""The serving simulation on recorded traffic: steps of a routing trace, and what planners are worth to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.planners.ours import Skip
from bench.serving_planners import Row, planner_of, tried
from eplb_triton import Topology
from eplb_triton.replay import Rules, Summary, replay_steps

WINDOW, TOKENS = 16, 128
GPUS = 16


class TraceJob(NamedTuple):
    """A routing trace, and who plans for it."""

    path: Path
    mixed: bool
    planners: Sequence[str]

    def __str__(self) -> str:
        return f"{self.path.stem}, {'mixed' if self.mixed else 'chunks'}"


def recorded_steps(path: Path, *, mixed: bool) -> Iterator[Tensor]:
    """Loads [L, E] of steps of 128 tokens: consecutive ones, or mixed as in decode.

    Mixed: a token each of 128 sequences; of a trace with fewer, of 128 streams that start evenly spaced.
    """
    with np.load(path) as arrays:
        ids, lengths = arrays["topk_ids"], arrays["seq_len"]
    order = np.arange(len(ids) // TOKENS * TOKENS)
    if mixed:
        enough = len(lengths) >= TOKENS
        order = side_by_side(lengths, TOKENS) if enough else order.reshape(TOKENS, -1).T.ravel()
    num_layers, num_experts = ids.shape[1], int(ids.max()) + 1
    offsets = num_experts * np.arange(num_layers)[None, :, None]
    for first in range(0, len(order), TOKENS):
        chosen = ids[order[first : first + TOKENS]].astype(np.int64) + offsets
        counts = np.bincount(chosen.ravel(), minlength=num_layers * num_experts)
        yield torch.from_numpy(counts.reshape(num_layers, num_experts)).float()


def side_by_side(lengths: NDArray[Any], lanes: int) -> NDArray[np.int64]:
    """Tokens in the order of steps in which each of `lanes` sequences gives one; a finished one makes room for the
    next, until none waits."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    waiting = list(zip(starts.tolist(), lengths.tolist(), strict=True))[::-1]
    running = [list(waiting.pop()) for _ in range(lanes)]
    steps = []
    while all(left > 0 for _, left in running):
        steps.append([at for at, _ in running])
        for lane in running:
            lane[0], lane[1] = lane[0] + 1, lane[1] - 1
            if lane[1] == 0 and waiting:
                lane[:] = waiting.pop()
    return np.array(steps).reshape(-1)


def judge_trace(job: TraceJob) -> list[Row | Skip]:
    """Per-step balancedness of the next window, and slots written a layer and plan, for every planner."""
    steps = list(recorded_steps(job.path, mixed=job.mixed))
    layers, experts = steps[0].shape
    slots = -(-experts * 5 // 4 // GPUS)
    topology = Topology(num_replicas=GPUS * slots, num_gpus=GPUS)
    changes = len(steps) // WINDOW - 1  # the first plan is none

    def row(name: str) -> Row:
        plan = planner_of(name, topology, experts, None, len(steps))
        summary = Summary.of(replay_steps(steps, None, plan, Rules(WINDOW, layer_steps=0)))
        return {
            "trace": job.path.stem,
            "steps": "mixed" if job.mixed else "chunks",
            "planner": name,
            "balancedness": summary.balancedness,
            "slots": summary.written / max(changes, 1) / layers,
        }

    return [tried(name, str(job), partial(row, name)) for name in job.planners]
