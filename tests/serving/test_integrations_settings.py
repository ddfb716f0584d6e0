"""Settings of the adapters, their counters, and the command doctor."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("click", reason="the command line: pip install -e .[cli]")
from click.testing import CliRunner

from eplb_triton import Topology
from eplb_triton.cli.program import commands
from eplb_triton.integrations.metrics import prometheus
from eplb_triton.integrations.replanner import Replanner
from eplb_triton.integrations.settings import enabled, read_settings
from tests.commands import launch
from tests.serving.frameworks import OwnPolicy, UnknownPolicy, fake_vllm


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


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Those of this process, over a stand-in of the client."""
    client: Any = ModuleType("prometheus_client")
    client.Counter = client.Gauge = client.Histogram = Counter
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    prometheus.cache_clear()
    yield prometheus()
    prometheus.cache_clear()


def test_what_an_adapter_counts(counters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is deployed, one of another backend, one that no backend makes, and one of a shadow."""
    replanner = Replanner("vllm", read_settings({"EPLB_TRITON_BACKEND": "reference", "EPLB_TRITON_AGREE": "0"}))
    topology, old = Topology(num_replicas=6, num_gpus=2), torch.tensor([[0, 1, 2, 3, 0, 1]])
    loads = torch.tensor([[1.0, 1, 20, 1]])
    monkeypatch.setattr(replanner, "_backends", lambda *_: ["reference", "reference"])
    made = replanner._by
    for fails in (0, 1, 2):
        left = [fails]

        def by(*arguments: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise RuntimeError("planted")
            return made(*arguments)

        monkeypatch.setattr(replanner, "_by", by)
        replanner.answer(lambda: loads, old, topology, 4, None)
    replanner.settings = dataclasses.replace(replanner.settings, shadow=True)
    replanner.answer(lambda: loads, old, topology, 4, None)
    values = counters.plans.values
    assert {outcome: sum(values["vllm", outcome]) for _, outcome in values} == {"deployed": 2, "kept": 1, "shadow": 1}
    assert sum(counters.fallbacks.values["vllm",]) == 3
    assert sum(counters.disagreements.values["vllm",]) == 1
    first, second, shadow = counters.slots.values["vllm",]
    assert first == second > shadow == 0
    assert counters.peak.values["vllm", "before"][0] > counters.peak.values["vllm", "after"][0]
    assert len(counters.seconds.values["vllm",]) == 4


def test_the_client_itself_takes_them(tmp_path: Path) -> None:
    """In a process of its own, with the folder that frameworks name for processes that count together."""
    pytest.importorskip("prometheus_client")
    code = (
        "from eplb_triton.integrations.metrics import prometheus\n"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "made = prometheus()\n"
        "made.planned('vllm', 'deployed', 0.5), made.moved('vllm', 7, 0.5, 0.8)\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    text = launch(code=code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).out
    assert 'eplb_triton_plans_total{framework="vllm",outcome="deployed"} 1.0' in text
    assert 'eplb_triton_slots_moved_total{framework="vllm"} 7.0' in text
    assert 'eplb_triton_peak_over_mean{framework="vllm",when="after"} 1.25' in text
    assert 'eplb_triton_plan_seconds_count{framework="vllm"} 1.0' in text


def test_no_counters_where_there_is_none(counters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    prometheus.cache_clear()
    assert prometheus() is None


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


@pytest.mark.parametrize(("own", "status"), [(OwnPolicy, 0), (UnknownPolicy, 1)])
def test_doctor_registers_with_a_framework_that_is_enabled(
    monkeypatch: pytest.MonkeyPatch, own: type, status: int
) -> None:
    for name, module in fake_vllm(policy=own).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("eplb_triton.cli.doctor.installed", lambda name: "0.33.0")
    monkeypatch.setattr("eplb_triton.cli.doctor.entry_points", lambda group: [SimpleNamespace(name="eplb_triton")])
    found, output = doctor(monkeypatch, VLLM="1")
    assert found == status, output
    assert ("vllm: registers; this package would plan" in output) == (status == 0)
    assert ("BAD  vllm: does not register" in output) == (status == 1)
