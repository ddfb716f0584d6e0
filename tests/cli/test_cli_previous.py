"""`eplb-triton plan --previous`: what is kept, what is printed, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_triton import Topology, plan
from eplb_triton.formats import read_plan, write_plan
from tests.commands import SERIES, SIZE, TOPOLOGY, refused, rows, run


@pytest.fixture
def live(tmp_path: Path) -> Path:
    write_plan(tmp_path / "live.npz", plan(SERIES[:2].sum(0), TOPOLOGY))
    return tmp_path / "live.npz"


@pytest.mark.parametrize("arguments", [[], ["--price", 0.01], ["--moves", 2], ["--window", 2, "--moves", 5]])
def test_a_series_is_a_history(loads: Path, live: Path, tmp_path: Path, arguments: list[object]) -> None:
    status, out, err = run("plan", loads, "--previous", live, *arguments, "-o", tmp_path / "ahead.npz")
    assert (status, err) == (0, "")
    options = dict(zip(map(str, arguments[::2]), arguments[1::2], strict=True))
    history = SERIES[2:] if "--window" in options else SERIES
    previous = read_plan(live).placement()
    price, moves = options.get("--price"), options.get("--moves")
    assert price is None or isinstance(price, float)
    assert moves is None or isinstance(moves, int)
    want = plan(history, TOPOLOGY, previous=previous, price=price, moves=moves)
    got = read_plan(tmp_path / "ahead.npz").placement()
    assert got.policy == "steady"
    assert got.fingerprint() == want.fingerprint()
    assert f"a history of {len(history)} steps" in out
    written = (got.phy2log != previous.phy2log).sum(1)
    assert moves is None or int(written.max()) <= moves
    assert rows(out)["slots"] == [
        f"{float(written.double().mean()):.1f}",
        str(int(written.max())),
        str(int(written.sum())),
    ]
    assert rows(out)["fills"][-1] == "0"
    assert want.changes is not None
    for peaks in (want.changes.peak_before, want.changes.peak_after):
        assert f"{float(peaks.mean()):.4f}" in out
        assert f"{float(peaks.max()):.4f}" in out
    order = [layer for layer in want.deployment_order().tolist() if layer >= 0]
    assert f"largest gain first: {', '.join(map(str, order))}" in out or not order
    assert order or price


def test_what_pays_nothing_is_not_moved(loads: Path, live: Path, tmp_path: Path) -> None:
    status, out, _ = run("plan", loads, "--previous", live, "--price", 1e6, "-o", tmp_path / "ahead.npz")
    assert status == 0
    assert rows(out)["slots"] == ["0.0", "0", "0"]
    assert "no layer is worth a change" in out
    kept, was = (read_plan(path).placement().phy2log for path in (tmp_path / "ahead.npz", live))
    assert torch.equal(kept, was)


def test_a_policy_that_does_not_replan_is_renumbered(loads: Path, live: Path) -> None:
    status, out, _ = run("plan", loads, "--previous", live, "--policy", "balanced")
    assert status == 0
    previous = read_plan(live).placement()
    want = plan(SERIES.sum(0), TOPOLOGY, "balanced", previous=previous)
    assert want.fingerprint() in out
    assert rows(out)["slots"][-1] == str(int(want.moved(previous).slots.sum()))
    assert "predicted" not in out


def test_the_counts_are_those_of_the_plan(loads: Path, live: Path) -> None:
    assert run("plan", loads, *SIZE, "--nodes", 1, "--previous", live).out == run("plan", loads, "--previous", live).out
    refused(run("plan", loads, "--gpus", 4, "--previous", live), f"--gpus 4 must be 8 or left out, as in {live}")


def test_refusals(loads: Path, live: Path, tmp_path: Path) -> None:
    base = ("plan", loads, "--previous", live)
    refused(run(*base, "--policy", "balanced", "--moves", 3), "--moves 3 is for a policy that replans, 'steady', not")
    refused(run(*base, "--price", -1), "--price -1.0 must be at least 0 and finite")
    refused(run(*base, "--price", "nan"), "--price nan must be at least 0 and finite")
    refused(run("plan", loads, "--previous", tmp_path / "none.npz"), "none.npz: expected a plan", "found no such file")
    np.save(tmp_path / "x.npy", np.ones((4, 16)))
    refused(
        run("plan", tmp_path / "x.npy", "--previous", live), "expected 5 layers of 16 experts like", "found 4 of 16"
    )


def test_hierarchical_plans_stay_hierarchical(loads: Path, tmp_path: Path) -> None:
    topology = Topology(num_replicas=24, num_gpus=8, num_groups=4, num_nodes=2)
    write_plan(tmp_path / "live.json", plan(SERIES[0], topology))
    status, out, _ = run("plan", loads, "--previous", tmp_path / "live.json")
    assert status == 0
    assert "2 nodes, 4 groups: hierarchical planning" in out
