"""What a replay takes for granted: what was given, and what stands in for what was not, each with its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.cli.replay_study import REPLAN_WINDOW, WINDOW, Setting, first_tokens
from eplb_triton.formats import StepStream
from eplb_triton.replay import SLOT_BYTES, Costs, layer_seconds_of
from eplb_triton.replay.costs import BANDWIDTH, FLOP_RATE
from eplb_triton.replay.splits import TABLE_STEPS, TABLE_WIDTH

LOOKED_AT = 256
"""Steps that the tokens of a step are counted in."""


@dataclass(frozen=True)
class Assumption:
    """One number, and where it comes from.

    Args:
        name: what it is.
        value: the number.
        shown: as it is printed, with its unit.
        source: its formula or meaning, and the option that says otherwise.
        given: whether the user said it.
    """

    name: str
    value: float
    shown: str
    source: str
    given: bool

    @property
    def text(self) -> str:
        """One line."""
        return f"{self.name} {self.shown}{', as given' if self.given else ''}: {self.source}"

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"name": self.name, "value": self.value, "given": self.given, "source": self.source}


def costs_of(
    stream: StepStream, num_gpus: int, slot_bytes: float | None, bandwidth: float | None, layer_time: float | None
) -> tuple[Costs, list[Assumption]]:
    """The costs of steps and moves, and what they rest on; a refusal where loads are no tokens and nobody said more."""
    bytes_used = SLOT_BYTES if slot_bytes is None else slot_bytes
    speed = BANDWIDTH if bandwidth is None else bandwidth
    found = [
        Assumption(
            "slot",
            bytes_used,
            f"{bytes_used:,.0f} B",
            "weights of one expert in one layer"
            if slot_bytes is not None
            else "3 x 7168 x 2048 x 2 B, an expert of DeepSeek-V3 in BF16; --slot-bytes says otherwise",
            slot_bytes is not None,
        ),
        Assumption(
            "bandwidth",
            speed,
            f"{speed / 1e9:,.4g} GB/s",
            "slots are written one after the other"
            + ("" if bandwidth is not None else "; NVLink of an H100; --bandwidth says otherwise"),
            bandwidth is not None,
        ),
    ]
    if layer_time is None:
        with refusing():
            tokens, whole = first_tokens(stream, LOOKED_AT)
        if not whole or tokens < 1:
            raise Refused(
                f"--layer-time SECONDS is needed: loads of {tokens:.4g} a layer and step are no whole numbers of "
                "tokens, from which a balanced expert layer's time would follow"
            )
        layer_time = layer_seconds_of(tokens / num_gpus, bytes_used)
        source = (
            f"{tokens / num_gpus:,.1f} tokens a GPU (mean of the first {min(LOOKED_AT, stream.length)} steps) x "
            f"{bytes_used:,.0f} operations / {FLOP_RATE / 1e12:,.0f}e12 a second, 40 % of an H100 in BF16; the part of "
            "a layer's step that grows with its busiest GPU's load, were all alike; --layer-time says otherwise"
        )
        found.append(Assumption("layer time", layer_time, microseconds(layer_time), source, given=False))
    else:
        source = "the part of a layer's step that grows with its busiest GPU's load, were all alike"
        found.append(Assumption("layer time", layer_time, microseconds(layer_time), source, given=True))
    with refusing():
        return Costs(bytes_used, speed, layer_time), found


def of_setting(setting: Setting) -> list[Assumption]:
    """What follows for one way to run a deployment."""
    at_once = setting.layer_steps == 0
    return [
        Assumption(
            "price",
            setting.price,
            f"{setting.price:.3g}",
            "what a written slot must save of the mean GPU load to pay: (slot / bandwidth) / (layer time x "
            f"max(1024, 2 x {setting.interval}) steps)"
            + (f", times {setting.price_times:g}, as that saved more" if setting.price_times != 1 else ""),
            given=False,
        ),
        Assumption(
            "deployment",
            setting.layer_steps,
            "at once" if at_once else "a layer a step",
            f"then {setting.interval} steps{'' if at_once else ' and one'} until the next plan; at first experts are "
            "in order, slot k holds expert k mod E" + (" of its node's" if setting.topology.planned_nodes > 1 else ""),
            given=at_once,
        ),
        Assumption(
            "judged",
            setting.judged_from,
            f"from step {setting.judged_from:,}",
            "the first, in which experts stand as they happened to, too"
            if setting.judged_from == 0
            else "by then the first plan is in force, whose slots are not counted; --from-start counts all",
            given=False,
        ),
        Assumption(
            "looking back",
            setting.window or WINDOW,
            f"{setting.window or WINDOW:,} steps",
            "of every policy"
            if setting.window
            else f"{max(REPLAN_WINDOW, setting.interval):,} for a policy that replans; --window says otherwise",
            given=setting.window is not None,
        ),
        Assumption(
            "table",
            TABLE_STEPS,
            f"{TABLE_WIDTH} entries an expert",
            f"tokens split by what the last {TABLE_STEPS} steps would have needed, made anew every {TABLE_STEPS} steps "
            "and where a layer changes",
            given=False,
        ),
    ]


def microseconds(seconds: float) -> str:
    """`176 us` as people write it."""
    return f"{1e6 * seconds:,.3g} µs"
