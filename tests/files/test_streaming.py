"""Recordings a step at a time: what `read_loads` reads, without holding it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eplb_triton.formats import FormatError, RoutingTrace, open_steps, read_loads

RANDOM = np.random.default_rng(0)
LOADS = RANDOM.integers(0, 50, (30, 3, 8))
IDS = RANDOM.integers(0, 8, (1000, 3, 2)).astype(np.uint8)
IDS[0, 0, 0] = 7


def saved(path: Path, array: NDArray[Any], name: str = "loads") -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.stem.endswith("packed"):
        arrays: Any = {name: array, "other": np.zeros(3)}
        np.savez_compressed(path, **arrays)
    else:
        arrays = {name: array}
        np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "packed.npz"])
@pytest.mark.parametrize("dtype", ["int64", "uint16", "float32", "float64", ">i4"])
def test_a_series_is_what_is_read_whole(tmp_path: Path, name: str, dtype: str) -> None:
    path = saved(tmp_path / name, LOADS.astype(dtype))
    stream = open_steps([path])
    assert (stream.length, stream.num_layers, stream.num_experts) == (30, 3, 8)
    for _ in range(2):
        assert torch.equal(torch.stack(list(stream)).double(), read_loads(path).steps_of(0, 30))


@pytest.mark.parametrize("name", ["topk_ids.npy", "a.npz", "packed.npz"])
@pytest.mark.parametrize("step_tokens", [1, 128, 300, 5000])
def test_a_trace_is_what_is_read_whole(tmp_path: Path, name: str, step_tokens: int) -> None:
    path = saved(tmp_path / name, IDS, "topk_ids")
    stream = open_steps([path], step_tokens=step_tokens)
    assert stream.length == max(1, 1000 // step_tokens)
    assert stream.num_experts == 8
    whole = read_loads(path)
    assert isinstance(whole, RoutingTrace)
    assert torch.equal(torch.stack(list(stream)).sum(0).double(), whole.loads(0, 1000))
    if step_tokens == 128:
        assert torch.equal(torch.stack(list(stream)).double(), whole.steps_of(0, 1000))


def test_padding_and_the_number_of_experts_are_told(tmp_path: Path) -> None:
    ids = IDS.astype(np.int16)
    ids[5] = -1
    path = saved(tmp_path / "topk_ids.npy", ids)
    assert "6 ids of 6000 are -1" in open_steps([path]).notes[1]
    assert "8 experts: the largest id is 7" in open_steps([path]).notes[0]
    assert open_steps([path], num_experts=9).num_experts == 9
    assert sum(int(step.sum()) for step in open_steps([path])) == 6000 - 6


@pytest.mark.parametrize("suffix", [".json", ".csv", ".npy"])
def test_what_cannot_be_streamed_is_read_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_text(str(LOADS.tolist()))
    elif suffix == ".csv":
        np.savetxt(path, LOADS[0], delimiter=",")
    else:
        np.save(path, np.asfortranarray(LOADS))
    assert torch.equal(torch.stack(list(open_steps([path]))).double(), read_loads(path).steps_of(0, 30))


def test_recordings_one_after_the_other(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "a.npy", LOADS[:10]), saved(tmp_path / "b.npz", LOADS[10:])]
    assert torch.equal(torch.stack(list(open_steps(paths))), torch.from_numpy(LOADS))
    few = saved(tmp_path / "c.npz", np.minimum(IDS, 5), "topk_ids")
    many = saved(tmp_path / "d.npz", IDS, "topk_ids")
    assert {step.shape[1] for step in open_steps([few, many])} == {8}
    with pytest.raises(FormatError, match=r"expected 3 layers of 8 experts.*found 2 of 8"):
        open_steps([paths[0], saved(tmp_path / "e.npy", LOADS[:, :2])])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (np.where(np.arange(30)[:, None, None] == 21, -1, LOADS), "a load of -1 at [step 21, layer 0, expert 0]"),
        (np.where(LOADS[9, 1, 4] == LOADS, np.nan, LOADS * 1.0), "a load of nan at [step"),
        (np.zeros((0, 3, 8)), "an empty array of shape [0, 3, 8]"),
        (np.ones((3, 8), dtype=bool), "values of type bool"),
    ],
)
def test_what_is_no_load_is_refused(tmp_path: Path, content: NDArray[Any], found: str) -> None:
    for name in ("a.npy", "packed.npz"):
        with pytest.raises(FormatError) as refused:
            list(open_steps([saved(tmp_path / name, content)]))
        assert found in str(refused.value)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", LOADS)
    path.write_bytes(path.read_bytes()[:-8])
    for broken in (path, tmp_path / "missing.npy", tmp_path / "missing.npz"):
        with pytest.raises(FormatError, match="expected loads"):
            open_steps([broken])
    saved(tmp_path / "topk_ids.npy", IDS)
    with pytest.raises(FormatError, match="ids are 0 to 4"):
        open_steps([tmp_path / "topk_ids.npy"], num_experts=5)


@pytest.mark.parametrize("name", ["a.npy", "packed.npz"])
def test_ten_times_the_steps_take_the_same_memory(tmp_path: Path, name: str) -> None:
    peaks = []
    for steps in (6000, 60_000):
        path = saved(tmp_path / name, np.ones((steps, 4, 128), np.uint16))
        tracemalloc.start()
        count = sum(1 for _ in open_steps([path]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == steps
    assert peaks[1] < 1.1 * peaks[0]


def test_of_recordings_that_are_read_whole_one_is_in_memory_at_a_time(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.json").write_text(str(np.ones((200, 4, 16), np.int64).tolist()))
    peaks = []
    for count in (2, 8):
        tracemalloc.start()
        steps = sum(1 for _ in open_steps([tmp_path / f"{number}.json" for number in range(count)]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert steps == 200 * count
    assert peaks[1] < 1.1 * peaks[0]
