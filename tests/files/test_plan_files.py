"""Plan files: written and read back, the faults they may have, and writing that leaves no halves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_triton import Placement, Topology, plan
from eplb_triton.formats import FormatError, check_plan_path, read_plan, write_plan, write_whole
from tests.comparing import assert_same


def a_plan() -> Placement:
    weight = torch.from_numpy(np.random.default_rng(1).integers(1, 100, (3, 8)))
    topology = Topology(num_replicas=12, num_gpus=4, num_groups=2, num_nodes=2)
    return plan(weight, topology, policy="hybrid_tail_waterfill", backend="reference")


@pytest.mark.parametrize("log2phy", [True, False])
@pytest.mark.parametrize("suffix", [".npz", ".pt", ".json"])
def test_a_plan_comes_back_as_it_was(tmp_path: Path, suffix: str, log2phy: bool) -> None:
    written = a_plan()
    write_plan(tmp_path / f"plan{suffix}", written, log2phy=log2phy)
    stored = read_plan(tmp_path / f"plan{suffix}")
    assert (stored.log2phy is not None) == log2phy
    back = stored.placement()
    for name in ("phy2log", "phyrank", "logcnt"):
        assert getattr(back, name).dtype == torch.int64
        assert_same(getattr(back, name), getattr(written, name), name)
    assert stored.log2phy is None or torch.equal(stored.log2phy, written.slots_of_experts())
    assert (back.topology, back.policy, back.fingerprint()) == (written.topology, written.policy, written.fingerprint())


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    placement = a_plan()
    for name in ("a", "b"):
        write_plan(tmp_path / f"{name}{suffix}", placement)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_plan_files_open_without_this_library(tmp_path: Path) -> None:
    placement = a_plan()
    for suffix in (".npz", ".pt", ".json"):
        write_plan(tmp_path / f"plan{suffix}", placement)
    with np.load(tmp_path / "plan.npz", allow_pickle=False) as archive:
        assert archive["phy2log"].tolist() == placement.phy2log.tolist()
        assert str(archive["policy"]) == "hybrid_tail_waterfill"
    assert torch.load(tmp_path / "plan.pt", weights_only=True)["num_gpus"] == 4
    document = (tmp_path / "plan.json").read_text()
    assert json.loads(document)["logcnt"] == placement.logcnt.tolist()
    assert json.dumps(placement.phy2log[1].tolist()) in [line.rstrip(",") for line in document.splitlines()]


def tampered(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A .json plan that `change` has altered."""
    path = tmp_path / "plan.json"
    write_plan(path, a_plan())
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("logcnt"), "no logcnt in it"),
        (lambda d: d.update(format_version=2), "format_version 2, this program knows 1"),
        (lambda d: d.update(policy=3), "policy of type int"),
        (lambda d: d.update(num_gpus="4"), "num_gpus: a str ('4')"),
        (lambda d: d.update(num_gpus=4.0), "num_gpus of type float64"),
        (lambda d: d.update(num_gpus=[4]), "num_gpus of type int64 and shape [1], which is no integer"),
        (lambda d: d.update(phy2log=[0] * 12), "phy2log of type int64 and shape [12], must be integers in 2 dim"),
        (lambda d: d["phy2log"][1].pop(), "phy2log: ragged rows: [1]"),
        (lambda d: d["phyrank"][0].__setitem__(0, 0.5), "phyrank of type float64"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, change: Any, text: str) -> None:
    path = tampered(tmp_path, change)
    with pytest.raises(FormatError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: expected a plan")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(num_gpus=5), "num_replicas=12 must be a multiple of num_gpus=5"),
        (lambda d: d.update(num_experts=7), "num_experts=7"),
        (lambda d: d.update(num_replicas=16), "phy2log"),
        (lambda d: d["phy2log"][1].__setitem__(3, 99), "layer 1, slot 3"),
        (lambda d: d["phy2log"][1].__setitem__(3, -1), "layer 1, slot 3"),
        (lambda d: d["logcnt"][2].__setitem__(0, 7), "layer 2: expert 0"),
        (lambda d: d["phyrank"][0].__setitem__(5, 9), "layer 0, slot 5"),
        (lambda d: d["log2phy"][2][1].__setitem__(0, 3), "log2phy[2, 1, 0] is 3, must be "),
        (lambda d: d.update(log2phy=[layer[:-1] for layer in d["log2phy"]]), "log2phy is of shape [3, 7, 5]"),
    ],
)
def test_a_plan_that_is_invalid(tmp_path: Path, change: Any, text: str) -> None:
    stored = read_plan(tampered(tmp_path, change))
    with pytest.raises(ValueError, match=r"plan\.json: ") as caught:
        stored.placement()
    assert text in str(caught.value)


def test_a_plan_without_layers_cannot_be_written(tmp_path: Path) -> None:
    empty = plan(torch.zeros(0, 8), Topology(num_replicas=12, num_gpus=4), backend="reference")
    with pytest.raises(ValueError, match="0 layers"):
        write_plan(tmp_path / "plan.json", empty)


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "plan.csv", "ends in .npz, .pt, .json; found a name that ends in '.csv'"),
        (tmp_path / "nowhere" / "plan.npz", "no folder to put it in"),
        (tmp_path, "a name that ends in 'no suffix'"),
    ):
        with pytest.raises(FormatError, match=text):
            check_plan_path(path)
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    with pytest.raises(FormatError, match="a folder"):
        check_plan_path(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_write_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "plan.npz"
    target.write_bytes(b"old")

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((FormatError, KeyboardInterrupt, MemoryError)) as caught:
        write_whole(target, b"new")
    if isinstance(error, OSError):
        assert str(caught.value) == f"{target}: expected a file that can be written; found No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.npz"]
    assert target.read_bytes() == b"old"


def test_a_write_goes_through_a_link_and_to_the_longest_name(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_whole(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    longest = tmp_path / ("x" * 250 + ".json")
    write_whole(longest, b"new")
    assert longest.read_bytes() == b"new"


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", b"")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_small_file_of_large_counts_is_refused_before_anything_of_their_size_is_made(tmp_path: Path) -> None:
    """log2phy of this plan would take 12.8 GB, the divisors of its replicas an hour."""
    experts, gpus = 40_000, 4
    slots = np.arange(2 * experts)[None] % experts
    plan_of: dict[str, Any] = {
        "format_version": 1,
        "policy": "x",
        "num_experts": experts,
        **{"num_replicas": 2 * experts, "num_groups": 1, "num_nodes": 1, "num_gpus": gpus},
        "phy2log": slots,
        "phyrank": np.arange(2 * experts)[None] // experts,
        "logcnt": np.full((1, experts), 2),
        "log2phy": np.zeros((1, 1, 1), np.int64),
    }
    np.savez_compressed(tmp_path / "plan.npz", **plan_of)
    with pytest.raises(ValueError, match=r"log2phy is of shape \[1, 1, 1\], must be \[1, 40000, 40001\]"):
        read_plan(tmp_path / "plan.npz").placement()
    plan_of.update(num_replicas=10**9, num_groups=4, num_nodes=4, num_gpus=10)
    np.savez_compressed(tmp_path / "plan.npz", **plan_of)
    with pytest.raises(ValueError, match="num_gpus=10 must be a multiple of num_nodes=4"):
        read_plan(tmp_path / "plan.npz").placement()
