"""`eplb-triton replay`: the verdict, the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_triton import Placement, Topology
from eplb_triton.cli import assumptions, verdict
from eplb_triton.cli.replay_study import FORESIGHT, KEPT, UNPLANNED, in_order
from eplb_triton.formats import open_steps
from eplb_triton.replay import EVEN, SPLITS
from eplb_triton.synthetic import serving_steps
from tests.commands import TOPOLOGY, launch, refused, run

STEPS = np.stack([step.numpy() for step in serving_steps(120, 2, 16, tokens_per_step=2000, top_k=4, seed=5)])
SIZE = ("--gpus", 4)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    np.save(tmp_path / "steps.npy", STEPS)
    return tmp_path / "steps.npy"


def as_json(*arguments: object) -> dict[str, Any]:
    result = run("replay", *arguments, "--json")
    assert (result.status, result.err) == (0, "")
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_verdict_comes_first_then_the_table_then_what_was_assumed(trace: Path) -> None:
    status, out, err = run("replay", trace, *SIZE)
    assert (status, err) == (0, "")
    body = as_json(trace, *SIZE)
    assert out.startswith(" ".join(body["verdict"]) + "\n")
    assert body["verdict"][0].startswith(
        "On this traffic 4 redundant experts, replanned every 15 steps by price, save "
    )
    assert "20 replicas of 16 experts on 4 GPUs, 5 slots each" in out
    for deployment in body["deployments"]:
        for split in SPLITS:
            assert f"{deployment['splits'][split]['par']:.3f}" in out
    for assumption in (
        "slot 88,080,384 B: 3 x 7168 x 2048 x 2 B",
        "bandwidth 900 GB/s",
        "layer time 441 µs: 2,002.7 tokens a GPU",
    ):
        assert assumption in out
    assert [deployment["name"] for deployment in body["deployments"]] == [
        UNPLANNED,
        "balanced" + KEPT,
        "steady" + KEPT,
        "deepseek",
        "balanced",
        "steady",
        FORESIGHT,
    ]


def test_the_figures_belong_together(trace: Path) -> None:
    body = as_json(trace, *SIZE, "--interval", 20, "--layer-time", 1e-3, "--slot-bytes", 1e6, "--bandwidth", 1e9)
    given = {assumption["name"]: assumption for assumption in body["assumptions"]}
    assert [given[name]["value"] for name in ("layer time", "slot", "bandwidth")] == [1e-3, 1e6, 1e9]
    assert all(given[name]["given"] for name in ("layer time", "slot", "bandwidth"))
    assert given["price"]["value"] == pytest.approx(1e-3 / (1e-3 * 1024))
    assert body["judged_from"] == 20 + 1 + 2
    base = body["deployments"][0]["splits"][EVEN]
    for deployment in body["deployments"]:
        moving = 0 if deployment["name"] == FORESIGHT else deployment["slots"] * 1e6 / 1e9
        for figures in deployment["splits"].values():
            assert figures["seconds"] == pytest.approx(1e-3 * (120 - body["judged_from"]) * 2 * figures["par"] + moving)
            assert figures["saved"] == pytest.approx(1 - figures["seconds"] / base["seconds"])
            assert 1 <= figures["par"] <= figures["par_p99"]
        assert deployment["splits"]["in the step"]["par"] <= deployment["splits"][EVEN]["par"] + 1e-3
    assert body["deployments"][0]["slots"] == 0


def test_the_same_bytes_again(trace: Path) -> None:
    first, second = (run("replay", trace, *SIZE, "--json").out for _ in range(2))
    assert first == second


def test_a_sweep_tries_every_pair_and_takes_the_cheapest(trace: Path) -> None:
    sizes = ("--replicas", 24, "--replicas", 16, "--interval", 10, "--interval", 30)
    body = as_json(trace, *SIZE, *sizes, "--policy", "balanced", "--policy", "steady")
    tried = [(row["replicas"], row["interval"], row["policy"]) for row in body["sweep"]]
    assert tried == [(p, i, name) for p in (16, 24) for i in (30, 10) for name in ("balanced", "steady")]
    least = min(row["seconds"] for row in body["sweep"])
    chosen = (body["topology"]["replicas"], body["interval"])
    assert any(row["seconds"] <= 1.005 * least for row in body["sweep"] if (row["replicas"], row["interval"]) == chosen)
    (row,) = (r for r in body["sweep"] if (r["replicas"], r["interval"], r["policy"]) == (*chosen, "steady"))
    (full,) = (deployment for deployment in body["deployments"] if deployment["name"] == "steady")
    assert (row["par"], row["slots"]) == (full["splits"][EVEN]["par"], full["slots"])
    assert "What was tried" in run("replay", trace, *SIZE, *sizes).out


def test_on_constant_loads_it_says_that_one_plan_is_enough(tmp_path: Path) -> None:
    np.save(tmp_path / "same.npy", STEPS[:1].repeat(100, 0))
    said = " ".join(as_json(tmp_path / "same.npy", *SIZE)["verdict"])
    assert "Replanning gains nothing over one plan: one by balanced, kept, saves " in said


def test_on_level_loads_it_says_to_leave_things_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "level.npy", np.full((60, 2, 16), 100))
    said = as_json(tmp_path / "level.npy", *SIZE, "--replicas", 16)["verdict"]
    assert said[0].startswith("On this traffic no planner saves as much as 0.5 %")
    assert said[1] == "Without a plan 0.0 % of that time is spent waiting for the busiest GPU."


def test_a_planner_that_costs_more_than_it_gains_is_said_to(trace: Path) -> None:
    said = " ".join(as_json(trace, *SIZE, "--bandwidth", 1e9)["verdict"])
    assert "deepseek as frameworks run it costs " in said
    assert " more than no plan and moves " in said


def test_a_trace_and_several_recordings(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 16, (4000, 2, 2)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", topk_ids=ids)
    body = as_json(tmp_path / "a.npz", *SIZE, "--at-once")
    assert (body["steps"], body["experts"]) == (31, 16)
    body = as_json(tmp_path / "a.npz", tmp_path / "a.npz", *SIZE, "--step-tokens", 64)
    assert (body["steps"], body["interval"]) == (124, 15)
    assert body["traces"] == [str(tmp_path / "a.npz")] * 2


def test_groups_stay_on_their_nodes_from_the_start(trace: Path) -> None:
    body = as_json(trace, *SIZE, "--nodes", 2, "--groups", 4, "--policy", "steady")
    assert body["topology"] == {"replicas": 20, "gpus": 4, "groups": 4, "nodes": 2}
    topology = Topology(num_replicas=20, num_gpus=4, num_groups=4, num_nodes=2)
    start = in_order(2, 16, topology)
    start.validate()
    assert start.phy2log[1].tolist() == [*range(8), 0, 1, *range(8, 16), 8, 9]
    assert torch.equal(in_order(2, 16, TOPOLOGY).phy2log, Placement.spread_in_order(2, 16, TOPOLOGY).phy2log)


def test_one_gpu_has_nothing_to_gain(trace: Path) -> None:
    body = as_json(trace, "--gpus", 1, "--policy", "balanced", "--policy", "steady")
    assert {figures["par"] for row in body["deployments"] for figures in row["splits"].values()} == {1.0}
    assert body["verdict"][0].startswith("On this traffic no planner saves as much as 0.5 %")


def test_percentages_and_slots_as_they_are_said() -> None:
    assert [verdict.in_percent(share) for share in (0.214, 0.0995, 0.0994, 0.001, -0.0)] == [
        "21 %",
        "10 %",
        "9.9 %",
        "0.1 %",
        "0.0 %",
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "Missing option '--gpus'"),
        ((*SIZE, "--replicas", 18), "num_replicas=18 must be a multiple of num_gpus=4"),
        ((*SIZE, "--replicas", 12), "steps.npy: num_replicas=12 must be at least num_experts=16"),
        (("--gpus", 0), "num_gpus=0 must be at least 1"),
        ((*SIZE, "--interval", 119), "--interval 119 must be at most 118: there are 120 steps"),
        ((*SIZE, "--bandwidth", 0), "bandwidth=0.0 must be above 0"),
        ((*SIZE, "--layer-time", -1), "layer_seconds=-1.0 must be above 0"),
        ((*SIZE, "--report", "page.pdf"), "page.pdf: expected an output file that ends in .html"),
        ((*SIZE, "--key", "x"), "expected an array named 'x'"),
        ((*SIZE, "--experts", 17), "16 experts a layer, not 17"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(trace: Path, arguments: tuple[object, ...], text: str) -> None:
    refused(run("replay", trace, *arguments), text)


def test_what_is_no_recording_is_refused_in_one_line(tmp_path: Path) -> None:
    refused(run("replay", tmp_path / "none.npy", *SIZE), "none.npy: expected loads", "no such file")
    (tmp_path / "empty.npy").write_bytes(b"")
    refused(run("replay", tmp_path / "empty.npy", *SIZE), "an empty file (0 bytes)")
    np.save(tmp_path / "short.npy", STEPS[:2])
    refused(run("replay", tmp_path / "short.npy", *SIZE), "expected at least 3 steps", "found 2")
    np.save(tmp_path / "none.npy", STEPS[:0])
    refused(run("replay", tmp_path / "none.npy", *SIZE), "an empty array of shape [0, 2, 16]")
    np.save(tmp_path / "late.npy", np.where(np.arange(120)[:, None, None] == 100, -1, STEPS))
    refused(run("replay", tmp_path / "late.npy", *SIZE), "a load of -1 at [step 100, layer 0, expert 0]")
    np.save(tmp_path / "shares.npy", STEPS / STEPS.sum(2, keepdims=True))
    refused(
        run("replay", tmp_path / "shares.npy", *SIZE), "--layer-time SECONDS is needed: loads of 1 a layer and step"
    )
    assert run("replay", tmp_path / "shares.npy", *SIZE, "--layer-time", 1e-4).status == 0


def test_the_tokens_of_the_first_steps_make_the_layer_time(trace: Path) -> None:
    costs, found = assumptions.costs_of(open_steps([trace]), 4, None, None, None)
    tokens = STEPS.sum() / 240 / 4
    assert costs.layer_seconds == pytest.approx(tokens * 88_080_384 / 400e12)
    assert not any(assumption.given for assumption in found)


@pytest.mark.full
def test_ten_times_the_steps_take_the_same_memory(tmp_path: Path) -> None:
    """The peak of a process of its own, once the steps that a plan may look back on are all there."""
    code = (
        "import resource, sys\n"
        "from eplb_triton.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(status)\n"
    )
    peaks = []
    for steps in (400, 4000):
        np.save(tmp_path / "steps.npy", np.random.default_rng(0).poisson(100, (steps, 8, 128)).astype(np.uint16))
        options = ("--gpus", 8, "--window", 64, "--interval", 100, "--policy", "deepseek", "--policy", "steady")
        result = launch("replay", tmp_path / "steps.npy", *options, code=code)
        assert result.status == 0, result.err
        peaks.append(int(result.out.rpartition("peak ")[2]))
    assert peaks[1] < 1.05 * peaks[0]
