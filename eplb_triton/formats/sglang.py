"""SGLang: the statistics that its expert distribution recorder dumps in `stat` mode.

A dump is `torch.save` of a dict whose `logical_count` is [B, L, E], tokens per expert for each of the B steps of
the recorder's buffer. The buffer is a ring: places not yet written are all zero, and once it is full the oldest
step is not the first.
Source: sglang/srt/eplb/expert_distribution.py, `_StatAccumulator.dump`.
"""

from __future__ import annotations

from eplb_triton.formats.arrays import Array

LOGICAL_COUNT = "logical_count"


def drop_idle_steps(logical_count: Array) -> tuple[Array, str]:
    """The steps of a [B, L, E] dump that hold a load, and a sentence about those that do not ("" if all do).

    Raises:
        ValueError: no step holds a load; the text says what was found.
    """
    steps = len(logical_count)
    busy = logical_count.reshape(steps, -1).any(axis=1)  # [B]
    idle = steps - int(busy.sum())
    if idle == steps:
        raise ValueError(f"{steps} steps that are all zero")
    return logical_count[busy], f"{idle} of {steps} steps are all zero and were dropped" if idle else ""
