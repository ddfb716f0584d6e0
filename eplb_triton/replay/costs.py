"""What steps and moves cost in seconds, and the assumptions that stand in for what nobody said."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eplb_triton.replans import replan_price

SLOT_BYTES = 3 * 7168 * 2048 * 2
"""An expert of DeepSeek-V3 in BF16: three matrices of 7168 x 2048."""
BANDWIDTH = 900e9
"""Bytes a second, NVLink of an H100."""
FLOP_RATE = 400e12
"""Floating point operations a second of the experts' matrix products: 40 % of what an H100 has in BF16."""


def layer_seconds_of(tokens_per_gpu: float, slot_bytes: float) -> float:
    """Seconds of an expert layer in one step, were it balanced: an operation a byte of BF16 weights and token.

    A weight of two bytes takes a multiplication and an addition a token. Left out are the reading of weights,
    attention and communication, which do not grow with the busiest GPU's tokens.
    """
    return tokens_per_gpu * slot_bytes / FLOP_RATE


@dataclass(frozen=True)
class Costs:
    """The three numbers that turn PAR and slots into seconds.

    Args:
        slot_bytes: weights of an expert, bytes.
        bandwidth: bytes a second at which slots are written, one after the other.
        layer_seconds: the part of a layer's step that is proportional to the busiest GPU's load, were all alike.

    Raises:
        ValueError: an argument that is not above 0 and finite; `slot_bytes` may be 0.
    """

    slot_bytes: float
    bandwidth: float
    layer_seconds: float

    def __post_init__(self) -> None:
        self.price(1)

    def price(self, interval: int) -> float:
        """What one written slot must save; see `replan_price`."""
        return replan_price(self.slot_bytes, self.bandwidth, self.layer_seconds, interval)

    def moving(self, written: float) -> float:
        """Seconds that writing so many slots takes."""
        return written * self.slot_bytes / self.bandwidth

    def serving(self, par: float) -> float:
        """Seconds of layer steps whose busiest GPU / mean add up to `par`."""
        return par * self.layer_seconds

    def paid_back(self, written: float, fall: float) -> float:
        """Steps after which writing so many slots has paid, where they lower a step's `par`, summed over layers, by
        `fall`; infinite where they do not."""
        return self.moving(written) / self.serving(fall) if fall > 0 else (math.inf if written else 0.0)
