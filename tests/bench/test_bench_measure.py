"""Times, cost curves, and planners that fail or are not there."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.case_run import run_case
from bench.cases import Case, series
from bench.machine import machine_class
from bench.planners.fetch import MANIFEST
from bench.planners.ours import Call, Planner, Skip, ours, probe
from bench.planners.peers import peers
from bench.run import choose
from bench.studies.scale import fit
from bench.style import spread
from eplb_triton import POLICIES, Topology

SMALL = Case("small", 2, 12, Topology(num_replicas=16, num_gpus=8), "drift", 5)


def _planner(name: str, error: Exception | None = None, phy2log: Tensor | None = None) -> Planner:
    def bind(loads: Tensor, topology: Topology) -> Any:
        def call() -> Tensor:
            if error:
                raise error
            return torch.arange(topology.num_replicas).repeat(len(loads), 1) % 12 if phy2log is None else phy2log

        return call

    return Planner(name, name, bind, lambda result: result, "", "")


def test_rounds_rotate_and_take_windows_in_turn() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: [lambda n=name, w=w: seen.append((n, w)) for w in range(3)] for name in ("a", "b")}
    measure.interleave(calls, 0.0)
    warm_up, rounds = seen[:2], [seen[at : at + 2] for at in range(2, len(seen), 2)]
    assert warm_up == [("a", 0), ("b", 0)]
    assert rounds == [[("a", 0), ("b", 0)], [("b", 1), ("a", 1)], [("a", 2), ("b", 2)]]


def test_warm_calls_come_before_timed_ones_and_are_not_counted() -> None:
    seen: list[int] = []
    timings = measure.interleave({"a": [partial(seen.append, window) for window in range(3)]}, 0.0, warm=True)
    assert seen == [0, 0, 0, 1, 1, 2, 2]
    assert len(timings["a"].milliseconds) == 3


@pytest.mark.full
def test_a_fast_planner_gets_more_rounds_than_a_slow_one_up_to_the_most() -> None:
    calls: dict[str, list[Call]] = {"fast": [lambda: None], "slow": [lambda: sum(range(300_000))]}
    timings = measure.interleave(calls, 0.01)
    assert len(timings["fast"].milliseconds) == measure.MAX_ROUNDS
    assert measure.MIN_ROUNDS <= len(timings["slow"].milliseconds) < measure.MAX_ROUNDS


def test_ratio_is_taken_pair_by_pair() -> None:
    found = measure.summary([1.0, 2.0, 4.0, 100.0], [10.0, 20.0, 4.0])
    assert found["times_as_fast"] == 10.0
    assert found["median_ms"] == 3.0
    assert found["rounds"] == 4
    assert "times_as_fast" not in measure.summary([1.0])


def test_a_planner_that_fails_is_a_line_not_a_crash() -> None:
    planners = [
        _planner("good"),
        _planner("bad", ValueError("no\nsuch thing")),
        _planner("odd", phy2log=torch.zeros(2, 16, dtype=torch.int64)),
    ]
    working, skips = probe(planners)
    assert [planner.name for planner in working] == ["good", "odd"]
    assert skips == [Skip("bad", "ValueError: no")]
    row = run_case(SMALL, series(SMALL), planners, 0.0, skips, lambda _: None)
    assert list(row["results"]) == ["good"]
    assert [(skip.planner, skip.case) for skip in skips[1:]] == [("bad", "small"), ("odd", "small")]


def test_missing_peers_are_lines_that_say_what_to_do(tmp_path: Path) -> None:
    found, skips = peers(tmp_path)
    assert not found
    assert [skip.planner for skip in skips] == ["vllm", "sglang", "sglang-vec", "vllm-ascend"]
    assert all("make peers" in skip.reason for skip in skips)


def test_a_peer_that_cannot_be_imported_is_a_line(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"vllm": {"version": "0"}}))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "default.py").write_text("import no_such_package_of_theirs")
    found, skips = peers(tmp_path)
    assert not found
    assert skips[0].reason.startswith("ModuleNotFoundError")


def test_every_policy_has_a_planner_and_the_table_takes_each_once() -> None:
    working = [planner for planner in ours() if planner.name.endswith("@reference")]
    assert [planner.algorithm for planner in choose(working, "")] == list(POLICIES)
    assert [planner.name for planner in choose(working, "deepseek@*")] == ["deepseek@reference"]


def test_fit_finds_the_exponent_of_the_upper_half_and_what_is_off() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    times = [50.0, 50.0, 50.0, *(3 * value**2 for value in values[3:6]), 1.0]
    found = fit(values, times, [True] * 6 + [False])
    assert found["exponent"] == pytest.approx(2)
    assert found["ms_at_1"] == pytest.approx(3)
    assert (found["fitted_from"], found["fitted_to"]) == (8.0, 32.0)
    assert [value for value, _ in found["off_line"]] == [1.0, 2.0, 64.0]


def test_labels_keep_apart_and_in_order() -> None:
    placed = spread([0.5, 0.5, 0.49, 0.99], 0.1, 0.0, 1.0)
    assert sorted(placed) == [placed[2], placed[0], placed[1], placed[3]]
    assert min(b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)) >= 0.1 - 1e-9
    assert max(placed) <= 1.0


def test_machine_class_is_a_short_name() -> None:
    found = {"cpu": "AMD EPYC 9654 96-Core Processor", "cores": 2, "gpu": None}
    assert machine_class(found) == "amd-epyc-9654-2c"
    assert (
        machine_class({**found, "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "gpu": "NVIDIA H100"}) == "intel-xeon-2c-h100"
    )
