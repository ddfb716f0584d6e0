"""Loads: what is read from each type of file, what is refused and how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_triton.formats import (
    LoadSeries,
    RoutingTrace,
    read_loads,
    recordings,
    write_whole,
)
from tests.recordings import IDS, LOADS, SERIES, found, save


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json", ".csv"])
def test_loads_of_one_step(tmp_path: Path, suffix: str) -> None:
    recording = read_loads(save(tmp_path / f"x{suffix}", LOADS))
    assert isinstance(recording, LoadSeries)
    assert (recording.length, recording.num_layers, recording.num_experts) == (1, 3, 8)
    assert torch.equal(recording.loads(0, 1), torch.from_numpy(LOADS).double())


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json", ".NPY"])
def test_a_series_of_loads(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x{suffix.lower()}", SERIES).rename(tmp_path / f"x{suffix}")
    recording = read_loads(path)
    assert (recording.length, recording.unit, recording.default_window) == (5, "step", 1)
    assert torch.equal(recording.loads(1, 4), torch.from_numpy(SERIES[1:4].sum(0)).double())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_every_real_type_of_loads(tmp_path: Path, dtype: str) -> None:
    values = (LOADS % 250).astype(dtype)
    assert torch.equal(
        read_loads(save(tmp_path / "x.npy", values)).loads(0, 1), torch.from_numpy(values.astype(np.float64))
    )


def test_bfloat16_and_a_tensor_that_requires_grad(tmp_path: Path) -> None:
    torch.save(torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16, requires_grad=True), tmp_path / "x.pt")
    assert read_loads(tmp_path / "x.pt").loads(0, 1).tolist() == [[1.5, 2.0]]


def test_sums_do_not_overflow_the_type_of_the_file(tmp_path: Path) -> None:
    values = np.full((3, 1, 2), 200, dtype=np.uint8)
    assert read_loads(save(tmp_path / "x.npy", values)).loads(0, 3).tolist() == [[600.0, 600.0]]


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".json"])
def test_a_trace_by_its_name(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x{suffix}", {"topk_ids": IDS, "seq_len": np.array([30, 10])})
    recording = read_loads(path)
    assert isinstance(recording, RoutingTrace)
    assert (recording.length, recording.unit, recording.default_window) == (40, "token", 2048)
    assert recording.notes == ("8 experts: the largest id is 7 (--experts to say otherwise)",)
    naive = torch.zeros(3, 8, dtype=torch.float64)
    for token in IDS[10:30]:
        for layer, ids in enumerate(token):
            for expert in ids:
                naive[layer, expert] += 1
    assert torch.equal(recording.loads(10, 30), naive)


@pytest.mark.parametrize("at_once", [1, 17, 6 * 40, 1 << 22])
def test_a_trace_counts_the_same_however_much_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    recording = read_loads(save(tmp_path / "topk_ids.npy", IDS.astype(np.uint8)), num_experts=300)
    whole = recording.loads(0, 40)
    monkeypatch.setattr(recordings, "_IDS_AT_ONCE", at_once)
    assert torch.equal(recording.loads(0, 40), whole)
    assert whole.shape == (3, 300)
    assert float(whole.sum()) == IDS.size


def test_a_nameless_array_is_a_trace_if_the_file_or_the_user_says_so(tmp_path: Path) -> None:
    assert isinstance(read_loads(save(tmp_path / "x.npy", IDS)), LoadSeries)
    assert isinstance(read_loads(save(tmp_path / "x.npy", IDS), kind="topk_ids"), RoutingTrace)
    assert isinstance(read_loads(save(tmp_path / "my_topk_ids.npy", IDS)), RoutingTrace)
    assert isinstance(read_loads(save(tmp_path / "my_topk_ids.npy", IDS), kind="loads"), LoadSeries)


def test_padding_of_a_trace_is_not_counted_and_said(tmp_path: Path) -> None:
    padded = np.concatenate([IDS, np.full((2, 3, 2), -1)])
    recording = read_loads(save(tmp_path / "x.npz", {"topk_ids": padded}), num_experts=8)
    assert float(recording.loads(0, 42).sum()) == IDS.size
    assert recording.notes == ("12 ids of 252 are -1, taken for padding and not counted",)


def test_an_sglang_dump_loses_its_idle_steps(tmp_path: Path) -> None:
    buffer = np.zeros((9, 3, 8), dtype=np.int32)
    buffer[[1, 2, 3, 5, 8]] = SERIES
    dump = {"rank": 0, "logical_count": torch.from_numpy(buffer), "average_utilization_rate_over_window": None}
    torch.save(dump, tmp_path / "expert_distribution_recorder_1.pt")
    recording = read_loads(tmp_path / "expert_distribution_recorder_1.pt")
    assert recording.length == 5
    assert recording.notes == ("4 of 9 steps are all zero and were dropped",)
    assert torch.equal(recording.loads(0, 5), torch.from_numpy(SERIES.sum(0)).double())


def test_idle_steps_of_any_other_series_stay(tmp_path: Path) -> None:
    assert read_loads(save(tmp_path / "x.npy", np.zeros((4, 2, 2)))).length == 4


def test_a_key_chooses_and_known_names_need_none(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", {"other": SERIES, "weight": LOADS})
    assert read_loads(path).length == 1
    assert read_loads(path, key="other").length == 5
    assert "other, weight" in found(path, key="mine")
    two = save(tmp_path / "two.json", {"a": LOADS, "b": LOADS})
    assert found(two) == "a, b"


def test_csv_may_have_a_header_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbf# counts of a day\r\nfirst, second\r\n1, 2.5\r\n\r\n3e2, 4\r\n")
    assert read_loads(path).loads(0, 1).tolist() == [[1.0, 2.5], [300.0, 4.0]]


def test_lists_of_tensors_and_negated_views_are_loads(tmp_path: Path) -> None:
    torch.save([torch.ones(3), torch.zeros(3)], tmp_path / "x.pt")
    assert read_loads(tmp_path / "x.pt").loads(0, 1).tolist() == [[1, 1, 1], [0, 0, 0]]
    torch.save(torch.complex(torch.ones(1, 2), -torch.ones(1, 2)).conj().imag, tmp_path / "y.pt")
    assert read_loads(tmp_path / "y.pt").loads(0, 1).tolist() == [[1, 1]]


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)
