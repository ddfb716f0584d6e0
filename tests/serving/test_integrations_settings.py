"""Settings of the adapters, their counters, and the command doctor."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("click", reason="the command line: pip install -e .[cli]")
from click.testing import CliRunner

from eplb_triton.cli.program import commands
from eplb_triton.integrations.metrics import Metrics, prometheus
from eplb_triton.integrations.settings import enabled, read_settings


def test_without_a_variable_replanning_by_price_and_agreement() -> None:
    settings = read_settings({})
    assert (settings.policy.name, settings.backend, settings.agree) == ("steady", "auto", True)
    assert (settings.price, settings.moves, settings.shadow, settings.stop_file) == (None, None, False, None)
    assert not settings.split
    assert not settings.stop_asked()
    assert not enabled("vllm", {})
    assert enabled("sglang", {"EPLB_TRITON_SGLANG": "1"})


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"PRICE": "nan"}, "EPLB_TRITON_PRICE='nan'"),
        ({"MOVES": "-1"}, "EPLB_TRITON_MOVES='-1'"),
        ({"MOVES": "3", "POLICY": "balanced"}, "EPLB_TRITON_MOVES=3 is for EPLB_TRITON_POLICY=steady"),
        ({"STOP_FILE": "/tmp/x", "AGREE": "0"}, "needs EPLB_TRITON_AGREE=1"),
        ({"SHADOW": "true"}, "EPLB_TRITON_SHADOW='true' must be 0 or 1"),
        ({"POLICY": "fast"}, "must be one of deepseek"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(variables: dict[str, str], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        read_settings({f"EPLB_TRITON_{name}": value for name, value in variables.items()})


class Counter:
    """As far as prometheus_client is called."""

    def __init__(self, name: str, words: str, labels: list[str], **_: object) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}
        self.name = name

    def labels(self, *names: str) -> Counter:
        self._at = names
        return self

    def inc(self, by: float = 1) -> None:
        self.values.setdefault(self._at, []).append(by)

    set = observe = inc


def test_counters_where_there_is_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = ModuleType("prometheus_client")
    client.Counter = client.Gauge = client.Histogram = Counter
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    made: Any = Metrics()
    made.planned("vllm", "deployed", 0.5)
    made.moved("vllm", 7, 0.5, 0.8)
    assert made.plans.values == {("vllm", "deployed"): [1]}
    assert made.slots.values == {("vllm",): [7]}
    assert made.peak.values == {("vllm", "before"): [2.0], ("vllm", "after"): [1.25]}


def test_no_counters_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    prometheus.cache_clear()
    assert prometheus() is None
    prometheus.cache_clear()


def doctor(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[int, str]:
    for name in ("VLLM", "SGLANG"):
        monkeypatch.delenv(f"EPLB_TRITON_{name}", raising=False)
    for name, value in ({"BACKEND": "reference"} | variables).items():
        monkeypatch.setenv(f"EPLB_TRITON_{name}", value)
    done = CliRunner().invoke(commands, ["doctor"])
    return done.exit_code, done.output


def test_doctor_says_that_planning_works(monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = doctor(monkeypatch)
    assert status == 0, output
    assert "plans with reference" in output
    assert "EPLB_TRITON_VLLM=1 enables it" in output


@pytest.mark.parametrize(("name", "value", "told"), [("VLLM", "on", "must be 0 or 1"), ("POLICY", "best", "unknown")])
def test_doctor_tells_what_would_not_work(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    status, output = doctor(monkeypatch, **{name: value})
    assert status == 1
    assert any(line.startswith("BAD") and told in line for line in output.splitlines())
