"""Replay: steps of a deployment one after the other, plans made on those that were, judged on those that come.

The one place where plans are judged on what comes next: the command line and the benchmarks use it. Nothing is kept but
the steps that a planner may look back on: a day of steps may be streamed.
"""

from eplb_triton.replay.costs import SLOT_BYTES, Costs, layer_seconds_of
from eplb_triton.replay.deployment import Deployment, Foresight, History, Plan, Rules, judged, replay_steps
from eplb_triton.replay.splits import EVEN, IN_STEP, LAST_STEPS, SPLITS
from eplb_triton.replay.tallies import Step, Summary, Tally

__all__ = [
    "EVEN",
    "IN_STEP",
    "LAST_STEPS",
    "SLOT_BYTES",
    "SPLITS",
    "Costs",
    "Deployment",
    "Foresight",
    "History",
    "Plan",
    "Rules",
    "Step",
    "Summary",
    "Tally",
    "judged",
    "layer_seconds_of",
    "replay_steps",
]
