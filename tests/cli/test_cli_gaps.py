"""The gap to the lower bound in what the commands print, against sums made here."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eplb_triton import POLICIES, Placement, Topology, lower_bound, plan
from eplb_triton.cli import gaps, terminal
from eplb_triton.cli.gaps import GAP
from eplb_triton.synthetic import lognormal_series
from tests.commands import SERIES, SIZE, TOPOLOGY, plans_of, refused, rows, run, save_plan

WITHOUT_PAIRING = "lower bound: without the pairing of two slots a GPU"
WITH_PAIRING = "lower bound: with the pairing of two slots a GPU"


def least(row: Sequence[int], topology: Topology) -> Fraction:
    """The mean GPU load; or the smallest t for which the ceil(w / t) replicas of all experts fit into the slots."""
    sizes = {Fraction(load, count) for load in row for count in range(1, topology.num_replicas + 1)}
    fits = [t for t in sizes if t and sum(max(1, math.ceil(load / t)) for load in row) <= topology.num_replicas]
    return max(Fraction(sum(row), topology.num_gpus), min(fits, default=Fraction(0)))


def peak(row: Sequence[int], slots: Sequence[int], topology: Topology) -> Fraction:
    """Load of the busiest GPU."""
    shares = [Fraction(row[expert], slots.count(expert)) for expert in slots]
    size = topology.slots_per_gpu
    return max(sum(shares[first : first + size], Fraction(0)) for first in range(0, len(slots), size))


def layer_gaps(placement: Placement, weight: Tensor, topology: Topology = TOPOLOGY) -> list[Fraction]:
    """In %, layer by layer."""
    pairs = zip(weight.tolist(), placement.phy2log.tolist(), strict=True)
    return [100 * (peak(row, slots, topology) / least(row, topology) - 1) for row, slots in pairs]


def printed(values: Sequence[Fraction]) -> list[str]:
    return [f"{float(value):,.3f}" for value in values]


def mean(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


@pytest.fixture
def two_slots(tmp_path: Path) -> tuple[object, ...]:
    """Five experts of 3 and one of 1 on 3 GPUs of two slots: two of the 3s meet, so 6 where the mean is 16 / 3."""
    np.save(tmp_path / "two.npy", np.array([[3, 3, 3, 3, 3, 1]]))
    return tmp_path / "two.npy", "--replicas", 6, "--gpus", 3


def test_plan_and_score_print_the_gap_overall_and_of_every_layer(tmp_path: Path) -> None:
    file = save_plan(tmp_path)
    weight = SERIES.sum(0)
    of_plan = layer_gaps(plan(weight, TOPOLOGY), weight)
    in_order = layer_gaps(Placement.spread_in_order(5, 16, TOPOLOGY), weight)
    assert all(gap > 0 for gap in of_plan)  # else the comparison would say little
    for command in (("plan", tmp_path / "loads.npz", *SIZE), ("score", file, tmp_path / "loads.npz")):
        _, out, _ = run(*command)
        assert GAP in out
        assert "lower bound: " not in out  # there is one
        assert rows(out)["mean"] == printed([mean(in_order), mean(of_plan)])
        assert rows(out)["worst"] == printed([max(in_order), max(of_plan)])
        worst, _, every = out.partition("every layer")
        for layer, row in enumerate(weight.tolist()):
            assert rows(every)[str(layer)][2] == printed(of_plan)[layer]
            cells = rows(worst)[str(layer)]
            assert cells[3] == printed(of_plan)[layer]
            assert cells[-1] == f"{float(least(row, TOPOLOGY)):,.1f}"


def test_every_layer_is_listed_once_in_columns(tmp_path: Path) -> None:
    weight = lognormal_series(1, 23, 16, tokens_per_step=2000, top_k=2, seed=5)[0]
    np.save(tmp_path / "x.npy", weight.numpy())
    _, out, _ = run("plan", tmp_path / "x.npy", *SIZE)
    lines = out.partition("every layer")[2].partition("fingerprint")[0].splitlines()
    cells = [cell for line in lines for cell in line.split() if cell[0].isdigit()]
    assert max(len(line.split()) // 3 for line in lines if line.strip()[:1].isdigit()) == 3
    listed = sorted(zip(map(int, cells[::3]), cells[1::3], cells[2::3], strict=True))
    placement = plan(weight, TOPOLOGY)
    balancedness = [f"{float(value):.4f}" for value in placement.balancedness(weight, per_layer=True)]
    assert listed == list(zip(range(23), balancedness, printed(layer_gaps(placement, weight)), strict=True))


def test_compare_prints_the_mean_and_the_worst_gap_and_every_layer(loads: Path) -> None:
    _, out, _ = run("compare", loads, *SIZE, "--per-layer")
    assert GAP in out
    of_layers = {}
    for name in POLICIES:
        windows = [layer_gaps(p, step) for p, step in zip(plans_of(name), SERIES, strict=True)]
        of_layers[name] = printed([mean(layer) for layer in zip(*windows, strict=True)])
        every = [gap for window in windows for gap in window]
        assert rows(out)[name][1:3] == printed([mean(every), max(every)])
    in_order = Placement.spread_in_order(5, 16, TOPOLOGY)
    every = [gap for step in SERIES for gap in layer_gaps(in_order, step)]
    assert rows(out)["none"][1:3] == printed([mean(every), max(every)])
    for layer in range(5):
        assert rows(out)[str(layer)][1:] == [of_layers[name][layer] for name in POLICIES]
    assert "every layer" not in run("compare", loads, *SIZE).out


def test_the_bound_is_computed_once_a_window(loads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(weight: Tensor, topology: Topology, *, pairing: bool) -> Tensor:
        calls.append(weight)
        return lower_bound(weight, topology, pairing=pairing)

    monkeypatch.setattr(gaps, "lower_bound", once)
    assert run("compare", loads, *SIZE, "--per-layer").status == 0
    assert torch.stack(calls).equal(SERIES.double())


def test_layers_without_load_have_no_gap(tmp_path: Path) -> None:
    weight = SERIES[0].clone()
    weight[2] = 0
    np.save(tmp_path / "x.npy", weight.numpy())
    _, out, _ = run("plan", tmp_path / "x.npy", *SIZE)
    assert rows(out)["2"] == ["2", "1.0000", "0.000"]
    of_others = layer_gaps(plan(weight[[0, 1, 3, 4]], TOPOLOGY), weight[[0, 1, 3, 4]])
    assert rows(out)["mean"][1] == printed([sum(of_others, Fraction(0)) / 5])[0]
    _, out, _ = run("compare", tmp_path / "x.npy", *SIZE, "--per-layer")
    assert rows(out)["2"] == ["2", *["0.000"] * len(POLICIES)]


def test_two_slots_a_gpu_without_pairing(two_slots: tuple[object, ...]) -> None:
    for command in ("plan", "compare"):
        _, out, _ = run(command, *two_slots)
        assert WITHOUT_PAIRING in out
        assert "--pairing-bound includes it" in out
        assert WITH_PAIRING not in out
        assert (rows(out)["mean"][1] if command == "plan" else rows(out)["balanced"][1]) == "12.500"  # 6 / (16 / 3)


def test_two_slots_a_gpu_with_pairing(two_slots: tuple[object, ...]) -> None:
    for command in ("plan", "compare"):
        _, out, _ = run(command, *two_slots, "--pairing-bound")
        assert WITH_PAIRING in out
        assert WITHOUT_PAIRING not in out
        gap = rows(out)["mean"][1] if command == "plan" else rows(out)["balanced"][1]
        assert 0 <= float(gap) <= 0.001  # the bound is 6, found to 1e-5


def test_pairing_without_scipy(
    two_slots: tuple[object, ...], loads: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "eplb_triton.bound.pairing", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    needs = "--pairing-bound needs SciPy: pip install 'eplb-triton[bound]'"
    refused(run("plan", *two_slots, "--pairing-bound"), needs)
    refused(run("compare", *two_slots, "--pairing-bound"), needs)
    refused(run("compare", tmp_path / "missing.npy", *two_slots[1:], "--pairing-bound"), needs)  # before any work
    assert run("plan", *two_slots).status == 0
    assert run("plan", *two_slots, "-o", tmp_path / "two.json").status == 0
    refused(run("score", tmp_path / "two.json", two_slots[0], "--pairing-bound"), needs)
    assert run("plan", loads, *SIZE, "--pairing-bound").status == 0  # three slots: there is nothing to pair


def test_a_gap_below_0_by_a_rounding_error_is_0() -> None:
    assert [gaps.percent(value) for value in (-1e-9, 0.0, 4e-6, 6e-6, 12.5)] == [
        "0.000",
        "0.000",
        "0.000",
        "0.001",
        "1,250.000",
    ]


def test_nothing_is_cut_at_80_columns(loads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And names are broken where their words end, nowhere else."""
    monkeypatch.setattr(terminal, "PIPE_WIDTH", 80)
    words = {word + "_" * (word != policy.split("_")[-1]) for policy in POLICIES for word in policy.split("_")}
    for arguments in (["compare"], ["compare", "--per-layer"], *(["plan", "--policy", policy] for policy in POLICIES)):
        _, out, _ = run(arguments[0], loads, *SIZE, *arguments[1:])
        assert "…" not in out
        for cell in out.partition("\n")[2].split():  # the first line is the path
            if "_" in cell:
                assert all(part in words for part in re.findall(r"[^_]+_?", cell)), cell


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (42, ["top2_tail_adaptive_and_second_light_refine"]),
        (24, ["top2_tail_adaptive_and_", "second_light_refine"]),
        (12, ["top2_tail_", "adaptive_", "and_second_", "light_refine"]),
        (0, ["top2_", "tail_", "adaptive_", "and_", "second_", "light_", "refine"]),
    ],
)
def test_a_name_is_broken_between_words(width: int, lines: list[str]) -> None:
    assert terminal.broken("top2_tail_adaptive_and_second_light_refine", width).split("\n") == lines
    assert terminal.broken("none (experts in order)", 16) == "none (experts in\norder)"
