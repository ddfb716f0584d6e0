"""What each command prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_triton import BALANCEDNESS, EFFORTS, POLICIES, Placement, Topology, backends, plan
from eplb_triton.cli import changes, comparing, options, study
from eplb_triton.formats import plans, read_plan
from tests.commands import SERIES, SIZE, TOPOLOGY, rows, run, save_plan

# plan


def test_plan_prints_what_it_gains_and_writes_what_it_says(loads: Path, tmp_path: Path) -> None:
    status, out, err = run("plan", loads, *SIZE, "-o", tmp_path / "plan.npz")
    assert (status, err) == (0, "")
    weight = SERIES.sum(0)
    expected = plan(weight, TOPOLOGY)
    before = Placement.spread_in_order(5, 16, TOPOLOGY)
    assert "24 replicas of 16 experts on 8 GPUs, 3 slots each; 1 node: global planning" in out
    assert "planned for steps 0 to 3, summed" in out
    assert BALANCEDNESS in out
    assert rows(out)["balancedness"] == [f"{p.balancedness(weight):.4f}" for p in (before, expected)]
    assert rows(out)["duplicate"] == [str(int(p.duplicates().sum())) for p in (before, expected)]
    assert f"fingerprint {expected.fingerprint()}" in out
    worst = int(expected.balancedness(weight, per_layer=True).argmin())
    assert rows(out)[str(worst)][1] == f"{float(expected.balancedness(weight, per_layer=True)[worst]):.4f}"
    written = read_plan(tmp_path / "plan.npz").placement()
    assert written.fingerprint() == expected.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loads.npz", "plan.npz"]


def test_plan_without_an_output_writes_nothing(loads: Path, tmp_path: Path) -> None:
    assert run("plan", loads, *SIZE)[0] == 0
    assert list(tmp_path.iterdir()) == [loads]


def test_plan_takes_the_most_recent_window(loads: Path) -> None:
    _, out, _ = run("plan", loads, *SIZE, "--window", 2)
    assert "planned for steps 2 to 3, summed" in out
    assert plan(SERIES[2:].sum(0), TOPOLOGY).fingerprint() in out
    _, out, _ = run("plan", loads, *SIZE, "--window", 9)
    assert "planned for steps 0 to 3, summed; 9 were asked for, the recording has no more" in out


@pytest.mark.parametrize("policy", POLICIES)
def test_plan_with_every_policy_hierarchically(loads: Path, tmp_path: Path, policy: str) -> None:
    output = tmp_path / "plan.json"
    arguments = ("--nodes", 2, "--groups", 4, "--policy", policy, "-o", output, "--no-log2phy")
    status, out, _ = run("plan", loads, *SIZE, *arguments)
    assert status == 0
    assert "2 nodes, 4 groups: hierarchical planning" in out
    assert "wrote" in out
    assert "(without log2phy)" in out
    document = json.loads(output.read_text())
    assert document["policy"] == policy
    assert "log2phy" not in document
    topology = Topology(num_replicas=24, num_gpus=8, num_groups=4, num_nodes=2)
    expected = plan(SERIES if policy == "steady" else SERIES.sum(0), topology, policy=policy)
    assert document["phy2log"] == expected.phy2log.tolist()


def test_plan_says_why_groups_are_ignored(loads: Path) -> None:
    _, out, _ = run("plan", loads, *SIZE, "--nodes", 2, "--groups", 3)
    assert "global planning, since 3 groups cannot be split evenly over 2 nodes" in out


def test_plan_uses_the_default_policy_of_the_library(loads: Path) -> None:
    _, out, _ = run("plan", loads, *SIZE)
    assert plan(SERIES.sum(0), TOPOLOGY).policy == "balanced"
    assert "experts in order   balanced" in out
    assert plan(SERIES.sum(0), TOPOLOGY, policy="balanced").fingerprint() in out


@pytest.mark.parametrize("effort", ["low", "high"])
def test_plan_with_less_and_with_more_effort(loads: Path, tmp_path: Path, effort: str) -> None:
    status, _, _ = run("plan", loads, *SIZE, "--policy", f"balanced_{effort}", "-o", tmp_path / "plan.npz")
    assert status == 0
    written = read_plan(tmp_path / "plan.npz").placement()
    assert written.policy == f"balanced_{effort}"
    assert written.fingerprint() == plan(SERIES.sum(0), TOPOLOGY, policy=EFFORTS[effort]).fingerprint()


# score and check


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return save_plan(tmp_path)


def test_score_judges_a_plan_by_other_loads(plan_file: Path, loads: Path) -> None:
    placement = read_plan(plan_file).placement()
    status, out, err = run("score", plan_file, loads, "--window", 3)
    assert (status, err) == (0, "")
    weight = SERIES.sum(0)
    assert rows(out)["balancedness"][-1] == f"{placement.balancedness(weight):.4f}"
    assert placement.fingerprint() in out
    assert "1 window of 3 steps; the last 1 step is left out" in out
    assert f"{placement.balancedness(SERIES[:3].sum(0)):.4f}" in out
    assert BALANCEDNESS in out


def test_score_takes_the_number_of_experts_from_the_plan(plan_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", topk_ids=np.zeros((10, 5, 2), dtype=np.uint8))
    status, out, _ = run("score", plan_file, tmp_path / "trace.npz")
    assert status == 0
    assert "2 of 16 experts a token" in out


def test_check_of_a_valid_plan(plan_file: Path) -> None:
    status, out, err = run("check", plan_file)
    assert (status, err) == (0, "")
    assert "a valid plan, 5 layers" in out
    assert "log2phy agrees with phy2log" in out


# demo


def test_demo_shows_every_policy_and_what_to_try_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "DEMO_WINDOWS", 2)
    monkeypatch.setattr(comparing, "DEMO_WINDOW", 4)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("demo", "-o", "made up.npz", "--plot", "demo.png", "--seed", 4)
    assert (status, err) == (0, "")
    for text in ("58 layers, 256 experts", "288 replicas", "32 GPUs", "hierarchical planning", BALANCEDNESS):
        assert text in " ".join(out.split())
    table = rows(out)
    for policy in POLICIES:
        assert float(table[policy][3]) > float(table["none"][3]) + 0.2
    assert "demo.png" in {path.name for path in tmp_path.iterdir()}
    with np.load("made up.npz") as archive:
        assert torch.equal(torch.from_numpy(archive["loads"]), comparing.demo_loads(4))
        assert archive["loads"].shape == (8, 58, 256)
    hint = next(line for line in out.splitlines() if " plan 'made up.npz' " in line)
    assert run("plan", "made up.npz", *hint.split("'")[2].split())[0] == 0
    assert (tmp_path / "plan.npz").exists()
    hint = next(line for line in out.splitlines() if " --previous " in line)
    assert run("plan", "made up.npz", *hint.split("'")[2].split())[0] == 0


def test_the_demo_ends_with_what_replanning_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "DEMO_WINDOWS", 2)
    monkeypatch.setattr(comparing, "DEMO_WINDOW", 4)
    _, out, _ = run("demo")
    table, last = rows(out.partition("What replanning gains")[0]), out.partition("What replanning gains")[2]
    for policy in ("balanced", "steady"):
        assert f"{table[policy][3]} " in next(line for line in last.splitlines() if policy in line)
    written = [table[policy][4] for policy in ("steady", "balanced")]
    assert f"writes {written[0]} slots a layer in place of {written[1]}." in last


@pytest.mark.parametrize(
    ("anew", "replanned", "words"),
    [
        (0.8, 1.0, "carries 20.0 % less than with balanced where steady replans"),
        (1.0, 0.8, "carries 25.0 % more than with balanced"),
        (0.8, 0.8, "carries as much as with balanced"),
    ],
)
def test_the_sentence_follows_the_numbers(anew: float, replanned: float, words: str) -> None:
    outcomes = [
        study.Outcome(name, following=[value], moved=[slots])
        for name, value, slots in (("balanced", anew, 70.0), ("steady", replanned, 3.0))
    ]
    assert words in changes.gain_words(*outcomes)
    assert changes.gain_words(*outcomes).endswith("writes 3.0 slots a layer in place of 70.0.")


def test_help_names_what_the_library_takes() -> None:
    """The options are declared without PyTorch, and so on their own."""
    assert options.BACKENDS == backends.BACKENDS
    assert options.PLAN_SUFFIXES == plans.PLAN_SUFFIXES
    out = run("--help").out
    for status in ("0  done", "1  the plan is invalid", "2  something given", "130  interrupted", "141  the reader"):
        assert status in out


def test_escape_sequences_in_a_plan_do_not_reach_the_terminal(plan_file: Path, loads: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"policy": "balanced"', '"policy": "red\\u001b[31m"'))
    for command in (["check", plan_file], ["score", plan_file, loads]):
        status, out, _ = run(*command)
        assert status == 0
        assert r"red\x1b[31m" in out
        assert "\x1b" not in out
