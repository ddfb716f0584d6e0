"""`eplb-triton convert` and `diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eplb_triton import Placement, Topology, plan
from eplb_triton.cli import options
from eplb_triton.cli.files import fetches
from eplb_triton.formats import SUFFIXES_OF, SlotMap, read_map, write_map, write_plan
from tests.commands import SERIES, TOPOLOGY, refused, rows, run

pytest.importorskip("yaml")


@pytest.fixture
def live(tmp_path: Path) -> Path:
    write_plan(tmp_path / "live.npz", plan(SERIES[0], TOPOLOGY))
    return tmp_path / "live.npz"


def slots_of(path: Path) -> torch.Tensor:
    return read_map(path).phy2log


@pytest.mark.parametrize("to", SUFFIXES_OF)
def test_there_and_back(live: Path, tmp_path: Path, to: str) -> None:
    there = tmp_path / f"there{SUFFIXES_OF[to][-1]}"
    status, out, err = run("convert", live, there, "--to", to)
    assert (status, err) == (0, "")
    assert f"wrote {there}: {to}" in out
    assert run("convert", there, tmp_path / "back.npz", "--to", "plan", "--gpus", 8).status == 0
    assert torch.equal(slots_of(tmp_path / "back.npz"), slots_of(live))


def test_layers_keep_their_numbers(live: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yml"
    assert run("convert", live, first, "--to", "tensorrt-llm", "--first-layer", 3).status == 0
    assert run("convert", first, second, "--to", "tensorrt-llm").status == 0
    stored = read_map(second)
    assert isinstance(stored, SlotMap)
    assert stored.first_layer == 3


def test_the_formats_of_the_help_are_those_of_the_library() -> None:
    assert tuple(SUFFIXES_OF) == options.FORMATS


def test_refusals_of_convert(live: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run("convert", live, tmp_path / "x.json", "--to", "vllm").status == 0
    refused(
        run("convert", tmp_path / "x.json", out, "--to", "plan"), "vllm says no number of GPUs, --to plan needs --gpus"
    )
    refused(run("convert", tmp_path / "x.json", out, "--to", "plan", "--gpus", 7), "num_replicas=24 must be a multiple")
    refused(run("convert", live, out, "--to", "plan", "--gpus", 4), f"--gpus 4 must be 8 or left out, as in {live}")
    refused(run("convert", live, out, "--to", "excel"), "'excel' is not one of 'plan', 'sglang'")
    refused(run("convert", live, tmp_path / "out.csv", "--to", "vllm"), "ends in .json for vllm; found")
    refused(run("convert", tmp_path / "none.yaml", out, "--to", "vllm"), "none.yaml: expected", "found no such file")
    (tmp_path / "x.json").write_text(json.dumps([[0, 2, 2]]))
    refused(run("convert", tmp_path / "x.json", out, "--to", "vllm"), "no slot for expert 1 in layer 0")
    assert not out.exists()


def test_a_plan_and_its_copy_do_not_differ(live: Path, tmp_path: Path) -> None:
    assert run("convert", live, tmp_path / "x.json", "--to", "vllm-ascend").status == 0
    status, out, err = run("diff", live, tmp_path / "x.json")
    assert (status, err) == (0, "")
    assert "the same expert in every slot" in out


def test_what_changes_is_counted(live: Path, tmp_path: Path) -> None:
    before = plan(SERIES[0], TOPOLOGY)
    after = plan(SERIES, TOPOLOGY, previous=before, price=0.0, moves=4)
    moved = after.moved(before)
    assert int(moved.slots.sum()) > 0
    write_map(tmp_path / "x.json", after, "vllm")
    status, out, err = run("diff", live, tmp_path / "x.json")
    assert (status, err) == (1, "")
    assert f"{int(moved.slots.sum())} of 120 slots change" in out
    of_layers = out.partition("GPU")[0] + out.partition("layer")[2].partition("   GPU")[0]
    assert f"{int(moved.fetches.sum())} experts fetched by GPUs, 0 of them from another node" in of_layers + out
    for layer in range(5):
        if int(moved.slots[layer]):
            cells = [str(layer), str(int(moved.slots[layer])), str(int(moved.fetches[layer])), "0"]
            assert any(line.split() == cells for line in out.splitlines())
    by_gpu = (after.phy2log != before.phy2log).view(5, 8, 3).sum((0, 2)).tolist()
    tail = out.rpartition("GPU")[2]
    for gpu, count in enumerate(by_gpu):
        if count:
            assert rows(tail)[str(gpu)][1] == str(count)


def test_fetches_by_a_plain_loop() -> None:
    topology = Topology(num_replicas=24, num_gpus=8, num_nodes=2, num_groups=1)
    live, ahead = (plan(step, topology) for step in SERIES[:2])
    fetched, between = fetches(live, ahead)

    def held(placement: Placement, layer: int, gpus: range) -> set[int]:
        return {int(placement.phy2log[layer, slot]) for gpu in gpus for slot in range(3 * gpu, 3 * gpu + 3)}

    for layer in range(5):
        for gpu in range(8):
            new = held(ahead, layer, range(gpu, gpu + 1)) - held(live, layer, range(gpu, gpu + 1))
            node = range(gpu // 4 * 4, gpu // 4 * 4 + 4)
            assert int(fetched[layer, gpu]) == len(new)
            assert int(between[layer, gpu]) == len(new - held(live, layer, node))
    assert torch.equal(fetched.sum(1), ahead.moved(live).fetches)


def test_refusals_of_diff(live: Path, tmp_path: Path) -> None:
    other = plan(SERIES[0], Topology(num_replicas=32, num_gpus=8))
    write_plan(tmp_path / "other.json", other)
    refused(run("diff", live, tmp_path / "other.json"), "other.json: expected 24 replicas of 16", "found 32 replicas")
    write_map(tmp_path / "x.json", other, "vllm")
    refused(run("diff", tmp_path / "x.json", tmp_path / "x.json"), "diff needs --gpus D")
    assert run("diff", tmp_path / "x.json", tmp_path / "x.json", "--gpus", 8).status == 0
