"""What the commands refuse, and how: one line on stderr, exit status 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eplb_triton.cli import planning, study
from tests.commands import SIZE, refused, run, save_plan


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return save_plan(tmp_path)


@pytest.mark.parametrize(("name", "status"), [("phy2log", 1), ("logcnt", 1), ("log2phy", 1), ("num_experts", 2)])
def test_check_says_what_is_wrong(plan_file: Path, name: str, status: int) -> None:
    document = json.loads(plan_file.read_text())
    document[name] = np.zeros_like(document[name]).tolist() if status == 1 else "many"
    plan_file.write_text(json.dumps(document))
    refused(run("check", plan_file), f"{plan_file}: ", status=status)
    refused(run("score", plan_file, "any.npy"), f"{plan_file}: ")


def test_score_refuses_loads_of_another_model(plan_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 16)))
    refused(run("score", plan_file, tmp_path / "x.npy"), "x.npy: expected 5 layers like", "found 4")
    np.save(tmp_path / "x.npy", np.ones((5, 8)))
    refused(run("score", plan_file, tmp_path / "x.npy"), "8 experts a layer, not 16")


COMMANDS: dict[str, list[object]] = {
    "plan": ["plan", "{loads}", *SIZE, "-o", "{folder}/out.npz"],
    "compare": ["compare", "{loads}", *SIZE, "--plot", "{folder}/out.png"],
    "score": ["score", "{plan}", "{loads}"],
}


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json", ".csv", ".txt"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_bad_loads(
    plan_file: Path, tmp_path: Path, command: str, suffix: str, content: bytes
) -> None:
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    words = [str(word).format(loads=bad, plan=plan_file, folder=tmp_path) for word in COMMANDS[command]]
    refused(run(*words), f"{bad}: expected loads [layers, experts]", "; found ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--replicas", 25], "num_replicas=25 must be a multiple of num_gpus=8; the nearest are 24 and 32"),
        (["--replicas", 8], "num_replicas=8 must be at least num_experts=16"),
        (["--gpus", 0], "num_gpus=0 must be at least 1"),
        (["--replicas", -24], "num_replicas=-24 must be at least 1"),
        (["--nodes", 3, "--groups", 3], "num_gpus=8 must be a multiple of num_nodes=3"),
        (["--nodes", 2, "--groups", 6], "num_groups=6 must divide num_experts=16"),
        (["--replicas", 10**12], "--replicas 1000000000000 must be at most 1048576"),
        (["--replicas", "many"], "'many' is not a valid integer. (see eplb-triton plan --help)"),
        (["--policy", "best"], "'best' is not one of 'deepseek'"),
        (["--policy", "best"], "'balanced', 'steady', 'balanced_low', 'balanced_high'. (see"),
        (["--backend", "abacus"], "'abacus' is not one of"),
        (["--price", 0.1], "--price 0.1 needs --previous PLAN"),
        (["--moves", 3], "--moves 3 needs --previous PLAN"),
        (["--moves", -1], "'--moves': -1 is not in the range"),
        (["--window", 0], "'--window': 0 is not in the range"),
        (["--key", "other"], "expected an array named 'other'; found loads"),
        (["--kind", "topk_ids", "--experts", 16], "ids are 0 to 15"),
        (["-o", "plan.csv"], "plan.csv: expected an output file that ends in .npz, .pt, .json; found"),
        (["-o", "nowhere/plan.npz"], "nowhere/plan.npz: expected a file that can be written; found no folder"),
        (["-o", "{loads}"], "expected an output file of its own; found the file of loads"),
        (["-o", "/proc/plan.json"], "/proc/plan.json: expected a file that can be written; found "),
    ],
)
def test_plan_refuses_what_cannot_be(
    loads: Path, tmp_path: Path, arguments: list[object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = loads.read_bytes()
    refused(run("plan", loads, *SIZE, *(str(word).format(loads=loads) for word in arguments)), text)
    assert [path.name for path in tmp_path.iterdir()] == ["loads.npz"]
    assert loads.read_bytes() == content


def test_outputs_are_refused_before_the_loads_are_read(tmp_path: Path) -> None:
    refused(run("plan", "missing.npy", *SIZE, "-o", tmp_path / "plan.csv"), "plan.csv")
    refused(run("compare", "missing.npy", *SIZE, "--plot", tmp_path / "plot.gif"), "plot.gif")
    refused(run("demo", "-o", tmp_path / "loads.csv"), "loads.csv")


def test_a_load_too_large_to_plan_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0, 1e31]]))
    refused(run("plan", tmp_path / "x.npy", "--replicas", 2, "--gpus", 1), "x.npy: loads[0, 1]=1e+31")
    status, _, err = run("compare", tmp_path / "x.npy", "--replicas", 2, "--gpus", 1)
    assert (status, err.count("\n")) == (2, 1)
    assert "x.npy: weight[0, 1]=1e+31" in err


def test_unknown_words_and_missing_ones(loads: Path) -> None:
    refused(run("guess"), "No such command 'guess'. (see eplb-triton --help)")
    refused(run("plan"), "Missing argument 'LOADS'")
    refused(run("plan", loads, "--gpus", 8), "Missing option '--replicas'")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["plan", "-h"], ["--version"]])
def test_help_is_no_error(arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "eplb-triton" in out


def test_an_interrupt_leaves_the_old_plan(plan_file: Path, loads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    old = plan_file.read_bytes()
    monkeypatch.setattr(planning, "plan", interrupt)
    status, _, err = run("plan", loads, *SIZE, "-o", plan_file)
    assert (status, err.strip()) == (130, "eplb-triton: interrupted")  # behind the line that ^C is on
    monkeypatch.setattr(study, "plan", interrupt)
    assert run("compare", loads, *SIZE)[0] == 130
    assert plan_file.read_bytes() == old
