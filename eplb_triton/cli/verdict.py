"""What a replay found, in plain words and for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eplb_triton import __version__
from eplb_triton.cli.assumptions import Assumption
from eplb_triton.cli.replay_study import FORESIGHT, KEPT, UNPLANNED, Outcome, plans_on, replans
from eplb_triton.formats import StepStream
from eplb_triton.replay import IN_STEP, SPLITS

NOTHING = 0.005
"""Less than this share of the time is called nothing."""


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The policy of the least modelled time, or of those that differ from it by nothing, the one that writes the fewest
    slots; ties: the first."""
    planned = [outcome for outcome in outcomes if plans_on(outcome.name)]
    least = min(outcome.seconds() for outcome in planned)
    return min((o for o in planned if o.seconds() <= least * (1 + NOTHING)), key=lambda outcome: outcome.written)


def in_words(stream: StepStream, outcomes: Sequence[Outcome]) -> list[str]:
    """Sentences, the most important first.

    Args:
        stream: what was replayed.
        outcomes: of one setting, `UNPLANNED` among them.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    base, best = by_name[UNPLANNED], best_of(outcomes)
    lost = 1 - 1 / base.tallies[SPLITS[0]].mean
    redundant = best.setting.topology.num_replicas - stream.num_experts
    saved = best.saved(base)
    sentences = []
    if saved < NOTHING:
        sentences.append(
            f"On this traffic no planner saves as much as {in_percent(NOTHING)} of the expert layers' time with "
            f"{redundant} redundant experts: leave experts in order."
        )
    else:
        how = "replanned" if replans(best.name) else "planned anew"
        by = "by price" if replans(best.name) else f"by {best.name}"
        sentences.append(
            f"On this traffic {redundant} redundant experts, {how} every {best.setting.interval:,} steps {by}, save "
            f"{in_percent(saved)} of the expert layers' time and move {_slots(best)} slots a layer and plan; splitting "
            f"tokens in the step would save {in_percent(best.saved(base, IN_STEP))}."
        )
    sentences.append(f"Without a plan {in_percent(lost)} of that time is spent waiting for the busiest GPU.")
    kept = [outcome for outcome in outcomes if outcome.name.endswith(KEPT)]
    if kept:
        once = min(kept, key=lambda outcome: outcome.seconds())
        worth = in_percent(once.saved(base))
        if 1 - best.seconds() / once.seconds() < NOTHING:
            sentences.append(f"Replanning gains nothing over one plan: one by {once.policy}, kept, saves {worth}.")
        else:
            sentences.append(f"One plan, kept, saves {worth}.")
    for outcome in outcomes:
        if plans_on(outcome.name) and outcome is not best:
            as_run = " as frameworks run it" if outcome.name == "deepseek" else ""
            saves = outcome.saved(base)
            worth = f"saves {in_percent(saves)}" if saves >= 0 else f"costs {in_percent(-saves)} more than no plan"
            sentences.append(f"{outcome.name}{as_run} {worth} and moves {_slots(outcome)} slots.")
    if FORESIGHT in by_name:
        known = by_name[FORESIGHT]
        share = in_percent(known.saved(base))
        sentences.append(
            f"A planner that knew the next {known.setting.interval:,} steps would save {share}, were its moves free."
        )
    return sentences


def in_percent(share: float) -> str:
    """`21 %`, `0.4 %`."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 9.95 else f"{value + 0.0:.1f} %"


def _slots(outcome: Outcome) -> str:
    slots = outcome.slots_a_plan
    return f"{slots:.0f}" if slots >= 9.95 else f"{slots:.1f}"


def as_json(
    stream: StepStream,
    words: Sequence[str],
    outcomes: Sequence[Outcome],
    sweep: Sequence[Outcome],
    assumptions: Sequence[Assumption],
) -> dict[str, Any]:
    """All figures; the same bytes from the same steps and settings, so that no time of this machine is in it."""
    base = next(outcome for outcome in outcomes if outcome.name == UNPLANNED)
    setting = outcomes[0].setting
    topology = setting.topology
    return {
        "eplb_triton": __version__,
        "traces": [str(path) for path in stream.paths],
        "steps": stream.length,
        "judged_from": setting.judged_from,
        "layers": stream.num_layers,
        "experts": stream.num_experts,
        "topology": {name.removeprefix("num_"): value for name, value in vars(topology).items()},
        "interval": setting.interval,
        "notes": list(stream.notes),
        "verdict": list(words),
        "assumptions": [assumption.as_json() for assumption in assumptions],
        "deployments": [_figures(outcome, base) for outcome in outcomes],
        "sweep": [_swept(outcome) for outcome in sweep],
    }


def _figures(outcome: Outcome, base: Outcome) -> dict[str, Any]:
    back = outcome.paid_back(base)
    return {
        "name": outcome.name,
        "policy": outcome.policy,
        "plans": outcome.plans,
        "slots": outcome.written,
        "slots_a_layer_and_plan": outcome.slots_a_plan,
        "bytes": outcome.written * outcome.setting.costs.slot_bytes,
        "moving_seconds": outcome.setting.costs.moving(outcome.written),
        "paid_back_steps": back if math.isfinite(back) else None,
        "fingerprint": outcome.placement.fingerprint() if outcome.placement else None,
        "splits": {
            split: {
                "par": tally.mean,
                "par_p99": tally.percentile(0.99),
                "seconds": outcome.seconds(split),
                "saved": outcome.saved(base, split),
            }
            for split, tally in outcome.tallies.items()
        },
    }


def _swept(outcome: Outcome) -> dict[str, Any]:
    (tally,) = outcome.tallies.values()
    return {
        "replicas": outcome.setting.topology.num_replicas,
        "interval": outcome.setting.interval,
        "policy": outcome.name,
        "par": tally.mean,
        "par_p99": tally.percentile(0.99),
        "slots": outcome.written,
        "slots_a_layer_and_plan": outcome.slots_a_plan,
        "seconds": outcome.seconds(),
    }
