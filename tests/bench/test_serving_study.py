"""The serving simulation: its rules, step by step, and its scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import serving_rules
from bench.machine import environment
from bench.planners.ours import Call, Skip
from bench.planners.ours import Planner as Peer
from bench.serving_planners import Row, loaded_peers, of_peer, ours, planner_of
from bench.serving_report import picture, report
from bench.serving_rules import BASELINE, CASES, Case, price_of, scores, simulate
from bench.serving_traces import TraceJob, judge_trace, side_by_side
from bench.studies.serving import Job, compact, judge
from eplb_triton import Placement, Planner, Topology
from eplb_triton.replay import Rules, Summary, replay_steps
from eplb_triton.synthetic import serving_steps

LAYERS = 6
SMALL = Case("R1", LAYERS, 32, 8)
"""Every layer stands for itself."""


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """[n, L, E] float32."""
    return torch.stack(list(serving_steps(200, LAYERS, 32, seed=5))).float()


@pytest.mark.parametrize("policy", ["deepseek", "steady"])
def test_as_step_by_step(policy: str, drawn: Tensor) -> None:
    """Where every layer stands for itself: as the replay judges, plans and deploys, one step after the other."""
    plan = ours(policy, SMALL.topology, 32, 1e-3, 40)
    got = simulate(SMALL, drawn, plan, 25)
    summary = Summary.of(replay_steps(list(drawn), SMALL.start(LAYERS), plan, Rules(25, least_load=1)))
    assert got["slots"] == summary.written > 0
    assert got["par"] == pytest.approx(summary.peak_over_mean, rel=1e-12)


def test_layers_that_stand_for_several(drawn: Tensor) -> None:
    """In force in the middle of their steps; the next plan waits for the end of the last ones."""
    case = Case("R1", 4 * LAYERS, 32, 8)
    seen: list[int] = []
    other = Placement.from_phy2log(case.start(LAYERS).phy2log.flip(1), 32, case.topology)

    def plan(history: Tensor, live: Placement | None) -> Placement:
        assert live is not None
        seen.append(len(history))
        return other if torch.equal(live.phy2log, case.start(LAYERS).phy2log) else case.start(LAYERS)

    assert simulate(case, drawn[:45], plan, 9)["slots"] == 4 * int((other.phy2log != case.start(LAYERS).phy2log).sum())
    assert seen == [10, 10 + 24 + 10]
    layer = int((other.phy2log[0] != case.start(LAYERS).phy2log[0]).sum())
    for steps, layers in ((11, 0), (12, 1), (15, 1), (16, 2), (31, 5), (32, 6)):
        assert simulate(case, drawn[:steps], plan, 9)["slots"] == 4 * layer * layers


@pytest.mark.parametrize("policy", ["deepseek", "steady"])
def test_few_layers_for_twins(policy: str, drawn: Tensor) -> None:
    """Six layers that stand for twelve: as all twelve where each has a twin, but for half a step in force."""
    few, twins = Case("R1", 2 * LAYERS, 32, 8), drawn.repeat_interleave(2, dim=1)
    stand, true = (simulate(few, loads, ours(policy, few.topology, 32, 1e-3, 40), 25) for loads in (drawn, twins))
    assert (stand["layers"], true["layers"]) == (LAYERS, 2 * LAYERS)
    assert stand["slots"] == true["slots"] > 0
    assert stand["par"] == pytest.approx(true["par"], rel=2e-3)


def test_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of layers that is that of the case is all of them; the baseline takes part without being asked."""
    monkeypatch.setattr(serving_rules, "STEPS", 90)
    job = Job(SMALL, 7, ["steady"], [20], None, None)
    rows, same = _rows(judge(job)), _rows(judge(job._replace(layers=LAYERS)))
    assert [(row["planner"], row["interval"], row["layers"]) for row in rows] == [(*BASELINE, 6), ("steady", 20, 6)]
    for row in (*rows, *same):
        del row["plan_ms"]
    assert rows == same


def _rows(found: list[Row | Skip]) -> list[Row]:
    """All of them: nobody failed."""
    rows = [row for row in found if not isinstance(row, Skip)]
    assert len(rows) == len(found)
    return rows


def test_a_plan_that_changes_nothing_takes_no_step(drawn: Tensor) -> None:
    seen: list[int] = []
    planner = Planner(SMALL.topology, LAYERS, 32, policy="steady", backend="reference")

    def plan(history: Tensor, live: Placement | None) -> Placement:
        seen.append(len(history))
        return planner(history, previous=live, price=1e9)

    assert simulate(SMALL, drawn[:31], plan, 9)["slots"] == 0
    assert seen == [10, 20, 30]


def test_the_start() -> None:
    for case in CASES:
        case.start(LAYERS).validate()
    assert CASES[0].start(LAYERS).phy2log[0, :19].tolist() == [*range(8), 7, *range(8, 16), 15, 16]


def test_the_price_from_the_text() -> None:
    """88 MB over 900 GB/s, against the balanced seconds of a layer's step times the steps that a plan serves."""
    seconds = 60 / (6144 * 58)
    for interval, served in ((1024, 2048), (256, 1024), (64, 1024)):
        assert price_of(CASES[0], interval) == pytest.approx(88_080_384 / 900e9 / seconds / served)


def test_scores() -> None:
    """Cases of a kind count alike, or by their times together; kinds, or every case of them, count 3, 1 and 3 times."""
    rows = []
    for case in CASES:
        row = {"kind": case.kind, "gpus": case.num_gpus, "seed": 1}
        before = 2.0 * case.num_gpus
        rows.append(row | {"planner": "deepseek", "interval": 1024, "seconds": before})
        after = before if case.kind != "Mix" else before / 2 if case.num_gpus == 256 else before * 2
        rows.append(row | {"planner": "other", "interval": 64, "seconds": after})
    found = scores(rows)
    assert found["deepseek", 1024] == pytest.approx(100)
    assert found["other", 64] == pytest.approx((3 * 100 + (50 + 50 + 50 + 200) / 4 + 3 * 100) / 7)
    mixed = 100 * (32 + 64 + 128 + 256) / (64 + 128 + 256 + 128)
    assert scores(rows, summed=True)["other", 64] == pytest.approx((6 * 100 + mixed) / 7)
    by_case = (3 * 7 * 100 + 50 + 50 + 50 + 200) / (3 * 7 + 4)
    assert scores(rows, by_case=True)["other", 64] == pytest.approx(by_case)


def test_a_peer_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes a line of the report, with its reason; an error of ours is raised."""
    monkeypatch.setattr(serving_rules, "STEPS", 60)

    def fail(loads: Tensor, topology: Topology) -> Call:
        raise RuntimeError("no room\nat all")

    peer = Peer("broken", "broken", fail, lambda maps: maps, "", "")
    monkeypatch.setattr("bench.serving_planners.loaded_peers", lambda: ({"broken": peer}, []))
    *rows, skip = judge(Job(SMALL, 7, ["deepseek", "broken"], [20], LAYERS, None))
    assert [row["planner"] for row in _rows(rows)] == ["deepseek", "deepseek"]
    assert skip == Skip("broken", "RuntimeError: no room", "R1 on 8 GPUs, seed 7")
    with pytest.raises(ValueError, match="planner='nobody' is unknown"):
        planner_of("nobody", SMALL.topology, 32, None, 1)


def test_who_is_told_what_is_in_force(drawn: Tensor) -> None:
    """A renumbered plan writes less and balances alike; a peer that asks for the placement in force gets it."""
    plain, kept = (
        simulate(SMALL, drawn, ours(name, SMALL.topology, 32, None, 1), 25)
        for name in ("deepseek", "deepseek+previous")
    )
    assert kept["slots"] < plain["slots"]
    assert kept["par"] == pytest.approx(plain["par"], rel=1e-2)
    seen: list[Placement] = []

    def after(loads: Tensor, topology: Topology, previous: Placement) -> Call:
        seen.append(previous)
        return lambda: previous.phy2log

    def alone(loads: Tensor, topology: Topology) -> Call:
        raise AssertionError("there is a placement in force")

    peer = Peer("idle", "idle", alone, lambda maps: maps, "", "", bind_after=after)
    assert simulate(SMALL, drawn[:40], of_peer(peer, SMALL.topology), 25)["slots"] == 0
    assert torch.equal(seen[0].phy2log, SMALL.start(LAYERS).phy2log)


@pytest.mark.parametrize("name", ["vllm", "vllm-ascend"])
def test_peers_that_ask_for_the_placement_in_force(name: str, drawn: Tensor) -> None:
    found, _ = loaded_peers()
    if name not in found:
        pytest.skip(f"{name} is not there: `make peers` fetches it")
    peer, loads = found[name], drawn.sum(0)
    first = peer.placement(loads, SMALL.topology)
    again = peer.placement(loads, SMALL.topology, first)
    assert torch.equal(again.phy2log, first.phy2log)


def test_sequences_side_by_side() -> None:
    """A token of each a step; a finished one makes room for the next, until none waits."""
    assert side_by_side(np.array([2, 3, 2, 2]), 2).tolist() == [0, 2, 1, 3, 5, 4, 6, 7]


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every planner, interval and trace is in the tables; JSON has a line a row; who took no part is named."""
    monkeypatch.setattr(serving_rules, "STEPS", 90)
    names = ["deepseek", "steady", "balanced+previous"]
    rows = _rows(judge(Job(SMALL, 7, names, [30, 20], LAYERS, None)))
    ids = np.random.default_rng(1).integers(0, 16, (128 * 40, 2, 2), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", topk_ids=ids, seq_len=np.full(40, 128, dtype=np.int32))
    traces = _rows(judge_trace(TraceJob(tmp_path / "noise.npz", False, names)))
    skipped = [{"planner": "absent", "reason": "is not there", "case": ""}]
    about = environment("bench.studies.serving") | {"cpu_seconds": 1, "commit": "0123456789abc"}
    body = {"environment": about, "rows": rows, "traces": traces, "skipped": skipped}
    text = report(body)
    for part in (
        "every 1024 steps | every 30 steps | every 20 steps",
        "| `balanced+previous` | – | ",
        "seed 7",
        "noise",
    ):
        assert part in text
    assert text.endswith("* `absent`: is not there\n")
    written = json.loads(compact(body))
    assert written["rows"]["columns"] == list(rows[0])
    assert len(written["rows"]["rows"]) == len(rows) == 1 + 2 * len(names)
    assert written["traces"]["rows"][0][:3] == ["noise", "chunks", "deepseek"]
    picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
