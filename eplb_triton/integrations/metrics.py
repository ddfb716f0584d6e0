"""Counters for Prometheus, where its client is installed; nothing at all where it is not."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)


class Metrics:
    """Counters and gauges of one process, in Prometheus' default registry. No method raises."""

    def __init__(self) -> None:
        client = import_module("prometheus_client")
        labels = ["framework"]
        self.plans = client.Counter("eplb_triton_plans", "Plans by outcome", [*labels, "outcome"])
        self.fallbacks = client.Counter("eplb_triton_fallbacks", "Plans that a backend could not make", labels)
        self.disagreements = client.Counter("eplb_triton_disagreements", "Plans that ranks did not agree on", labels)
        self.slots = client.Counter("eplb_triton_slots_moved", "Physical slots written", labels)
        self.seconds = client.Histogram(
            "eplb_triton_plan_seconds", "Seconds to plan and compare", labels, buckets=(0.001, 0.01, 0.1, 1.0, 10.0)
        )
        self.peak = client.Gauge(
            "eplb_triton_peak_over_mean",
            "Load of the busiest GPU / mean, of the last plan",
            [*labels, "when"],
            multiprocess_mode="livemax",  # the same on every rank: one series, not one a process
        )

    def planned(self, framework: str, outcome: str, seconds: float) -> None:
        """A plan has ended: deployed, kept, shadow, stopped or own (the framework's)."""
        self.plans.labels(framework, outcome).inc()
        self.seconds.labels(framework).observe(seconds)

    def moved(self, framework: str, slots: int, before: float | None, after: float) -> None:
        """Slots that a plan writes, and balancedness before and after."""
        self.slots.labels(framework).inc(slots)
        for when, balancedness in (("before", before), ("after", after)):
            if balancedness:
                self.peak.labels(framework, when).set(1 / balancedness)


@cache
def prometheus() -> Any:
    """The counters of this process, or None where there is no client, or it already has counters of these names."""
    try:
        return Metrics()
    except ImportError:
        return None
    except Exception:
        logger.exception("no counters: prometheus_client refuses them")
        return None
