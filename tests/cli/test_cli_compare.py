"""`compare`: what it prints, what it leaves out, what it draws."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_triton import BALANCEDNESS, POLICIES, Placement, Policy
from eplb_triton.cli import plots
from tests.commands import SERIES, SIZE, TOPOLOGY, plans_of, rows, run


def test_compare_prints_what_every_policy_does(loads: Path) -> None:
    status, out, err = run("compare", loads, *SIZE)
    assert (status, err) == (0, "")
    assert "4 windows of 1 step" in out
    assert BALANCEDNESS in out
    table = rows(out)
    assert [name for name in table if name in POLICIES] == list(POLICIES)
    for policy in POLICIES:
        plans = plans_of(policy)
        pairs = list(zip(plans[1:], plans[:-1], strict=True))
        planned, mean_gap, worst_gap, following, moved, fetched, duplicates, milliseconds = table[policy]
        gaps = torch.stack([p.gap(w) for p, w in zip(plans, SERIES, strict=True)]) * 100
        assert planned == f"{np.mean([p.balancedness(w) for p, w in zip(plans, SERIES, strict=True)]):.4f}"
        assert (mean_gap, worst_gap) == (f"{gaps.mean():.3f}", f"{gaps.max():.3f}")
        assert following == f"{np.mean([by_step(p, w[None]) for p, w in zip(plans, SERIES[1:], strict=False)]):.4f}"
        assert moved == f"{np.mean([p.moved(q).slots.numpy() for p, q in pairs]):.1f}"
        assert fetched == f"{np.mean([p.moved(q).fetches.numpy() for p, q in pairs]):.1f}"
        assert duplicates == f"{np.mean([p.duplicates().numpy() for p in plans]):.1f}"
        assert float(milliseconds.replace(",", "")) > 0
    in_order = Placement.spread_in_order(5, 16, TOPOLOGY)
    assert "none (experts spread in order)" in out
    assert table["none"][0] == f"{np.mean([in_order.balancedness(step) for step in SERIES]):.4f}"
    assert table["none"][-1] == "-"


def by_step(placement: Placement, steps: torch.Tensor) -> float:
    """Sum of mean / sum of max GPU loads over steps and layers, by a plain loop over slots."""
    mean, peak = 0.0, 0.0
    for step in steps.tolist():
        for loads, slots, counts in zip(step, placement.phy2log.tolist(), placement.logcnt.tolist(), strict=True):
            gpus = [sum(loads[e] / counts[e] for e in slots[at : at + 3]) for at in range(0, 24, 3)]
            mean, peak = mean + sum(gpus) / 8, peak + max(gpus)
    return mean / peak


def test_compare_judges_by_the_steps_of_the_next_window(loads: Path) -> None:
    _, out, _ = run("compare", loads, *SIZE, "--window", 2)
    for policy in ("balanced", "steady"):
        first, second = plans_of(policy, size=2)
        assert rows(out)[policy][3] == f"{by_step(first, SERIES[2:]):.4f}"
        assert rows(out)[policy][4] == f"{float(second.moved(first).slots.double().mean()):.1f}"
    assert float(rows(out)["steady"][4]) < float(rows(out)["balanced"][4])


def test_compare_says_what_it_leaves_out(loads: Path) -> None:
    _, out, _ = run("compare", loads, *SIZE, "--window", 3)
    assert "1 window of 3 steps; the last 1 step is left out, too few for a window" in out
    assert "Only one window" in out
    assert "next" not in rows(out)
    _, out, _ = run("compare", loads, *SIZE, "--window", 9)
    assert "1 window of 4 steps, shorter than the 9 asked for: the recording has no more" in out


def test_compare_counts_a_trace_in_tokens(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 16, (4596, 3, 2))
    np.savez(tmp_path / "trace.npz", topk_ids=ids)
    _, out, _ = run("compare", tmp_path / "trace.npz", *SIZE)
    assert "2 windows of 2,048 tokens; the last 500 tokens are left out" in out
    assert "note: 16 experts: the largest id is 15" in out
    _, out, _ = run("compare", tmp_path / "trace.npz", *SIZE, "--experts", 20)
    assert "2 of 20 experts a token" in out


def test_a_seventh_policy_appears_by_itself(loads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "seventh", Policy("seventh", gpu_pack="spread"))
    _, out, _ = run("compare", loads, *SIZE, "--plot", tmp_path / "x.svg")
    assert "seventh" in rows(out)
    assert (tmp_path / "x.svg").stat().st_size > 10_000


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_compare_draws(loads: Path, tmp_path: Path, suffix: str, begin: bytes) -> None:
    picture = tmp_path / f"picture{suffix}"
    status, out, err = run("compare", loads, *SIZE, "--window", 4, "--plot", picture)
    assert (status, err) == (0, "")
    assert f"wrote {picture}" in out
    assert picture.read_bytes().startswith(begin)


def test_a_picture_of_one_idle_layer_on_one_gpu(tmp_path: Path) -> None:
    name = tmp_path / "$loads$ 負荷.npy"  # neither a formula nor a letter that the font has
    np.save(name, np.zeros((1, 2)))
    status, _, err = run("compare", name, "--replicas", 2, "--gpus", 1, "--plot", tmp_path / "x.png")
    assert (status, err) == (0, "")


@pytest.mark.skipif("EPLB_TRACES" not in os.environ, reason="EPLB_TRACES names no folder with law.npz")
def test_compare_of_a_real_trace() -> None:
    trace = Path(os.environ["EPLB_TRACES"]) / "law.npz"
    status, out, _ = run("compare", trace, "--window", 2000, "--replicas", 80, "--gpus", 16)
    assert status == 0
    assert "4 windows of 2,000 tokens; the last 327 tokens are left out" in out
    for policy in POLICIES:
        assert (0.8 if policy == "steady" else 0.96) < float(rows(out)[policy][0]) < 1
    assert float(rows(out)["steady"][3]) > float(rows(out)["balanced"][3])
    assert float(rows(out)["steady"][4]) < 20 < float(rows(out)["balanced"][4])


def test_policies_have_colours_and_markers_of_their_own() -> None:
    styles = list(zip(POLICIES, plots._styles(), strict=False))
    for key in ("color", "marker"):
        assert len({style[key] for _, style in styles}) == len(POLICIES)
