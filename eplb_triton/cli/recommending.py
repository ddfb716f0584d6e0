"""The command `recommend`: which replicas, interval, policy and price, and how to set them in a framework."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from eplb_triton.cli import words
from eplb_triton.cli.assumptions import costs_of, of_setting
from eplb_triton.cli.inputs import check_backend
from eplb_triton.cli.options import LoadsFile
from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.cli.replay_study import UNPLANNED, WINDOW, Outcome, Setting, replans, replay_all
from eplb_triton.cli.replay_tables import print_sweep
from eplb_triton.cli.replaying import POLICIES, choose, open_stream, settled, topologies
from eplb_triton.cli.terminal import console, progress, say
from eplb_triton.cli.verdict import NOTHING, in_percent
from eplb_triton.formats import StepStream
from eplb_triton.printing import printable
from eplb_triton.replay import EVEN

INTERVALS = (1024, 256, 64)
FEWEST_PLANS = 4
MOST_COUNTS = 4
"""Numbers of slots a GPU that are tried, the fewest and the most among them."""
PRICES = (1.0, 0.25, 4.0)
"""Of the price that follows from the costs."""


def recommend(
    traces: Sequence[LoadsFile],
    gpus: int,
    nodes: int | None,
    groups: int | None,
    slots_per_gpu: int,
    window: int | None,
    step_tokens: int,
    slot_bytes: float | None,
    bandwidth: float | None,
    layer_time: float | None,
    backend: str,
) -> None:
    """Try settings on recorded traffic, and say which to run with."""
    check_backend(backend)
    stream = open_stream(traces, step_tokens)
    counts = [slots * max(1, gpus) for slots in _slots_tried(stream, gpus, slots_per_gpu)]
    shapes = topologies(stream, gpus, nodes, groups, counts)
    costs, assumptions = costs_of(stream, gpus, slot_bytes, bandwidth, layer_time)
    intervals = _intervals_tried(stream)
    skipped = settled(stream, intervals, 1.0)
    settings = [
        Setting(topology, interval, costs, window, backend=backend, judged_from=skipped)
        for topology in shapes
        for interval in intervals
    ]
    with progress("trying settings", stream.length) as advance, refusing():
        pairs = [(setting, policy) for setting in settings for policy in POLICIES]
        sweep = replay_all(stream, pairs, (EVEN,), advance)
    best = choose(sweep)
    with progress("trying prices", stream.length) as advance, refusing():
        base, best = _at_best_price(stream, best, advance)
    out = console()
    say(out, _advice(stream, base, best), "bold")
    say(out)
    say(out, words.stream_words(stream))
    for note in stream.notes:
        say(out, printable(f"note: {note}"), "yellow")
    print_sweep(out, sweep, choose(sweep))
    for heading, lines in _lines(stream, best).items():
        say(out, heading, "bold")
        for line in lines:
            say(out, f"  {line}")
    say(out)
    for assumption in [*assumptions, *of_setting(best.setting)]:
        say(out, assumption.text)


def _slots_tried(stream: StepStream, gpus: int, most: int) -> list[int]:
    """Slots a GPU: the fewest that hold every expert, the most that there is memory for, and some between."""
    fewest = -(-stream.num_experts // max(1, gpus))
    if most < fewest:
        raise Refused(
            f"--slots-per-gpu {most} must be at least {fewest}: {most} on each of {gpus} GPUs hold {most * gpus} of "
            f"{stream.num_experts} experts"
        )
    count = min(MOST_COUNTS, most - fewest + 1)
    return sorted({fewest + round(index * (most - fewest) / max(1, count - 1)) for index in range(count)})


def _intervals_tried(stream: StepStream) -> list[int]:
    """Those that leave time for some plans; else one that does."""
    fit = [interval for interval in INTERVALS if interval * FEWEST_PLANS <= stream.length]
    return fit or [max(1, stream.length // FEWEST_PLANS - 1)]


def _at_best_price(stream: StepStream, best: Outcome, advance: Callable[[], None]) -> tuple[Outcome, Outcome]:
    """The outcome without a plan, and that of the price of least time; the one that follows from the costs unless
    another saves something."""
    prices = PRICES if replans(best.name) else PRICES[:1]
    settings = [replace(best.setting, price_times=times) for times in prices]
    pairs = [(best.setting, UNPLANNED), *((setting, best.name) for setting in settings)]
    base, *tried = replay_all(stream, pairs, (EVEN,), advance)
    least = min(tried, key=lambda outcome: outcome.seconds())
    return base, least if least.seconds() < tried[0].seconds() * (1 - NOTHING) else tried[0]


def _advice(stream: StepStream, base: Outcome, best: Outcome) -> str:
    """One sentence with all that has to be set."""
    setting, topology = best.setting, best.setting.topology
    price = f" at a price of {setting.price:.2g}" if replans(best.name) else ""
    redundant = topology.num_replicas - stream.num_experts
    return (
        f"Run with {topology.num_replicas} replicas, {redundant} of them redundant and {topology.slots_per_gpu} a GPU, "
        f"planned by {best.name}{price} every {setting.interval:,} steps: it saves {in_percent(best.saved(base))} of "
        f"the expert layers' time (PAR {base.tallies[EVEN].mean:.2f} to {best.tallies[EVEN].mean:.2f}) and moves "
        f"{best.slots_a_plan:.1f} slots a layer and plan."
    )


def _lines(stream: StepStream, best: Outcome) -> dict[str, list[str]]:
    """What to type, by framework."""
    setting, topology = best.setting, best.setting.topology
    redundant = topology.num_replicas - stream.num_experts
    window = setting.interval if replans(best.name) else min(setting.window or WINDOW, setting.interval)
    config = {"window_size": window, "step_interval": setting.interval, "num_redundant_experts": redundant}
    ours = f"EPLB_TRITON_POLICY={best.name}"
    if replans(best.name):
        ours += f" EPLB_TRITON_PRICE={setting.price:.3g}"
    return {
        "vLLM": [
            f"EPLB_TRITON_VLLM=1 {ours} vllm serve MODEL --enable-expert-parallel --enable-eplb "
            f"--eplb-config '{json.dumps(config)}'"
        ],
        "SGLang": [
            f"EPLB_TRITON_SGLANG=1 {ours} python -m sglang.launch_server --model-path MODEL "
            f"--ep-size {topology.num_gpus} --enable-eplb --ep-num-redundant-experts {redundant} "
            f"--eplb-rebalance-num-iterations {setting.interval}"
        ],
    }
