"""Results and reports: from a tiny run to its tables, and from the tables of the docs back to their results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import report, results, run
from bench.machine import ROOT
from bench.studies import balance, next_window, scale
from bench.tables import source
from eplb_triton import POLICIES, Topology

DOCUMENTS = [ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "policies.md"]
PLANNERS = "deepseek@reference,adaptive_tail_and_fixup@reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run over one small case."""
    out = tmp_path_factory.mktemp("results")
    arguments = ["--cases", "qwen3", "--planners", PLANNERS, "--seconds", "0", "--no-cold", "--out", str(out)]
    done = CliRunner().invoke(run.main, arguments)
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.full
def test_a_result_says_where_it_comes_from(folder: Path) -> None:
    found = json.loads((folder / "cases.json").read_text())
    environment = found["environment"]
    for key in ("date", "command", "cpu", "cores", "system", "python", "versions", "commit", "dirty", "torch_threads"):
        assert key in environment
    assert environment["versions"]["torch"]
    row = found["cases"][0]["results"]["deepseek@reference"]
    assert len(row["milliseconds"]) == row["rounds"] == 3
    assert len(row["balancedness"]) == 3
    assert len(row["moved_slots"]) == 2


@pytest.mark.full
def test_the_report_has_tables_pictures_and_their_source(folder: Path) -> None:
    text = (folder / "REPORT.md").read_text()
    assert "balancedness = mean GPU load summed over layers" in text.replace("Balancedness", "balancedness")
    assert source(results.load(folder)["cases"]) in text
    for picture in ("time.png", "balance-and-time.png"):
        assert f"({picture})" in text
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_blocks_are_filled_once_and_again(folder: Path) -> None:
    found = results.load(folder)
    empty = "a\n<!-- bench:times -->\n<!-- /bench:times -->\nb\n<!-- bench:scale -->\nkept\n<!-- /bench:scale -->\n"
    filled = report.fill(empty, found, folder / "README.md")
    assert "| qwen3 | `deepseek@reference` |" in filled
    assert "\nkept\n" in filled
    assert report.fill(filled, found, folder / "README.md") == filled
    with pytest.raises(ValueError, match="names no table"):
        report.fill("<!-- bench:nothing --><!-- /bench:nothing -->", found, folder / "README.md")


def test_a_straight_line_is_found_and_its_largest_error() -> None:
    assert scale._straight([1, 2, 4, 256], [3.0, 5.0, 9.0, 513.0]) == "1 + 2 ms, within 0%"
    bent = scale._straight([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0])  # a parabola is no line
    assert int(bent.split("within ")[1].rstrip("%")) > 30


@pytest.mark.full
def test_a_picture_is_linked_from_where_the_document_stands(folder: Path) -> None:
    block = "<!-- bench:time.png -->\n<!-- /bench:time.png -->"
    linked = report.fill(block, results.load(folder), folder.parent / "docs" / "page.md")
    assert f"![time](../{folder.name}/time.png)" in linked


def test_a_wrong_name_is_refused_in_a_line() -> None:
    done = CliRunner().invoke(run.main, ["--cases", "no-such-case"])
    assert done.exit_code == 2
    assert "matches none of" in done.output


@pytest.mark.full
def test_a_study_of_one_sweep_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(float(layers), scale._case(layers, 16, 32, 8)) for layers in (1, 2, 4, 8)]
    monkeypatch.setattr(scale, "sweeps", lambda: {"L": points})
    arguments = ["--planners", "deepseek@reference", "--seconds", "0", "--out", str(tmp_path)]
    done = CliRunner().invoke(scale.main, arguments)
    assert done.exit_code == 0, done.output
    assert "| L | `deepseek@reference` | 1 to 8 |" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.full
def test_the_balance_study_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in balance.drawn(2, 0) if case.name == "V3, global"]
    monkeypatch.setattr(balance, "drawn", lambda layers, seed: cases)
    monkeypatch.delenv("EPLB_TRACES", raising=False)
    monkeypatch.setattr(balance, "TINY", balance.TINY[:1])
    done = CliRunner().invoke(balance.main, ["--tiny", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "All promises kept." in done.output
    found = results.load(tmp_path)["balance"]
    assert found["kind"] == "balance"
    for_one_window = {name for name, policy in POLICIES.items() if not policy.replan}
    assert set(found["cases"][0]["policies"]) == {*for_one_window, "balanced_low", "balanced_high"}
    text = (tmp_path / "REPORT.md").read_text()
    assert balance.table(found) in text
    assert balance.tiny_table(found) in text
    assert "; recorded: no folder of routing traces" in text
    assert source(found) in text
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert "![gap.png](gap.png)" in text


def test_a_broken_promise_fails_the_balance_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = torch.arange(1, 25, dtype=torch.float32).reshape(2, 12)
    case = balance.Case("small", loads, Topology(num_replicas=16, num_gpus=4), promised=-1.0)
    monkeypatch.setattr(balance, "drawn", lambda layers, seed: [case])
    monkeypatch.delenv("EPLB_TRACES", raising=False)
    done = CliRunner().invoke(balance.main, ["--tiny", "0", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "A promise is broken.\nsmall: mean gap" in done.output
    assert len(results.load(tmp_path)["balance"]["broken"]) == 1
    assert "Tiny instances" not in (tmp_path / "REPORT.md").read_text()


def test_the_table_of_gaps_takes_the_best_other_policy_and_the_efforts_by_name() -> None:
    gaps = {"deepseek": 0.02, "a": 0.03, "b": 0.01, "low": 0.005, "mid": 0.001, "high": 0.0004}
    policies = {name: {"mean_gap": gap, "layers_worse_than_deepseek": 3} for name, gap in gaps.items()}
    case = {"case": {"name": "small", "layers": 7}, "promised": 0.0015, "policies": policies}
    efforts = {"low": "low", "medium": "mid", "high": "high"}
    text = balance.table({"efforts": efforts, "cases": [case], "skipped": []})
    assert text.splitlines()[2] == "| small | 2.000% | 1.000% | 0.500% | **0.100%** | 0.040% | 0.15% | 3 / 7 |"


def test_the_table_of_tiny_instances_has_signs_and_sizes() -> None:
    shapes = [{"experts": experts, "topology": {"num_gpus": gpus}} for experts, gpus in ((6, 4), (12, 8))]
    found = {"shapes": shapes, "instances": 6, "solved": 5, "over_optimum": {"bound": -0.02, "deepseek": 0.031}}
    text = balance.tiny_table({"tiny": found})
    assert "| lower bound | -2.00% |\n| `deepseek` | +3.10% |" in text
    assert "5 of 6 instances that the solver finished: 6 to 12 experts, 4 to 8 GPUs." in text
    assert not balance.tiny_table({"tiny": {**found, "solved": 0}})


def test_topology_of_the_next_window_study() -> None:
    assert next_window.topology_for(64).num_replicas == 80


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.is_file()], ids=lambda path: path.name)
def test_every_published_table_is_what_its_result_gives(document: Path) -> None:
    text = document.read_text()
    for block in re.finditer(r"<!-- bench:([\w.-]+) -->\n(.*?)<!-- /bench:\1 -->", text, flags=re.DOTALL):
        if not block[2].strip():
            continue  # not yet published
        folders = re.findall(r"bench/results/[\w.-]+", block[2])
        assert folders, f"{block[1]} names no result"
        empty = f"<!-- bench:{block[1]} -->\n<!-- /bench:{block[1]} -->"  # stays so without a result
        assert report.fill(empty, results.load(ROOT / folders[-1]), document) == block[0]
