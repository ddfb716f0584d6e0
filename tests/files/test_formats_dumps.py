"""Recorder dumps of SGLang, statistics of TensorRT-LLM, written here by hand as they write them: read and refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_triton.formats import LoadSeries, open_steps, read_loads
from tests.recordings import refusal, write_text

pytest.importorskip("safetensors")


SLOTS = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])  # [L, P]; three experts


def dump(path: Path, rank: int, passes: dict[int, Any], slots: torch.Tensor = SLOTS, *, tokens: bool = False) -> Path:
    """A recorder's file of one rank."""
    records: list[dict[str, Any]] = []
    for number, counts in passes.items():
        record = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
        record["global_physical_count"] = torch.as_tensor(counts, dtype=torch.int32)
        if tokens:
            record |= {"topk_ids_of_layer": torch.full((2, 5, 1), -1, dtype=torch.int32), "input_ids": [1, 2]}
        records.append(record)
    torch.save({"records": records, "last_physical_to_logical_map": slots}, path)
    return path


FIRST = {4: [[1, 2, 3, 4], [5, 6, 7, 8]], 5: [[1, 0, 0, 0], [0, 0, 0, 1]]}


SECOND = {4: [[10, 0, 0, 0], [0, 0, 0, 0]], 5: [[0, 0, 0, 0], [0, 2, 0, 0]], 6: [[9, 9, 9, 9], [9, 9, 9, 9]]}


SUMMED = [[[15, 2, 3], [7, 14, 5]], [[1, 0, 0], [0, 3, 0]]]


@pytest.mark.parametrize("tokens", [False, True])
def test_dumps_of_ranks_are_summed_by_pass_and_scattered(tmp_path: Path, tokens: bool) -> None:
    dump(tmp_path / "r0.pt", 0, FIRST, tokens=tokens)
    dump(tmp_path / "r1.pt", 1, SECOND, tokens=tokens)
    recording = read_loads(tmp_path)
    assert isinstance(recording, LoadSeries)
    assert recording.steps.tolist() == SUMMED
    assert recording.notes[0] == "2 passes of 2 ranks, summed over ranks"
    assert recording.notes[1] == "1 passes that some rank has no record of were left out"
    alone = read_loads(tmp_path / "r0.pt")
    assert isinstance(alone, LoadSeries)
    assert alone.steps.tolist() == [[[5, 2, 3], [7, 14, 5]], [[1, 0, 0], [0, 1, 0]]]


def test_gatherers_of_a_pass_are_summed(tmp_path: Path) -> None:
    path = dump(tmp_path / "x.pt", 0, FIRST)
    content = torch.load(path, weights_only=True)
    content["records"].append({**content["records"][0], "gatherer_key": "other"})
    content["records"][-1]["global_physical_count"] = torch.ones(2, 4, dtype=torch.int32)
    torch.save(content, path)
    recording = read_loads(path)
    assert isinstance(recording, LoadSeries)
    assert recording.steps[0].tolist() == [[7, 3, 4], [8, 16, 6]]


def test_stat_dumps_with_all_their_names(tmp_path: Path) -> None:
    counts = torch.arange(12, dtype=torch.int32).view(2, 2, 3)
    content = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}
    torch.save(content, tmp_path / "x.pt")
    recording = read_loads(tmp_path / "x.pt")
    assert isinstance(recording, LoadSeries)
    assert recording.steps.tolist() == counts.tolist()


def recorded(folder: Path, seconds: float, rank: int | None) -> Path:
    """The name that SGLang gives a dump."""
    return folder / f"expert_distribution_recorder_{seconds}{'' if rank is None else f'_{rank}'}.pt"


def test_a_folder_of_several_dumps_is_one_series(tmp_path: Path) -> None:
    """Each by its own map, in order of time, which that of names is not."""
    for number, seconds in enumerate((999.75, 1000.5)):
        slots = SLOTS if number == 0 else SLOTS.flip(1)
        dump(recorded(tmp_path, seconds, 0), 0, FIRST, slots=slots)
        dump(recorded(tmp_path, seconds + 0.125, 1), 1, SECOND, slots=slots)
    series = read_loads(tmp_path)
    assert isinstance(series, LoadSeries)
    assert series.steps[:2].tolist() == SUMMED
    assert series.steps.shape == (4, 2, 3)
    assert series.steps.sum() == 2 * np.sum(SUMMED)
    assert series.notes[0] == "2 dumps, one after the other"
    assert torch.equal(torch.stack(list(open_steps([tmp_path]))), torch.from_numpy(series.steps))
    recorded(tmp_path, 1000.625, 1).unlink()
    assert "2 of rank 0, 1 of rank 1" in refusal(read_loads, tmp_path)


def test_a_folder_of_statistics_is_one_series(tmp_path: Path) -> None:
    counts = np.arange(1, 25).reshape(4, 2, 3)
    for seconds, steps in ((999.5, counts[:3]), (1000.0, counts[3:])):
        torch.save({"rank": 0, "logical_count": torch.from_numpy(steps)}, recorded(tmp_path, seconds, None))
    series = read_loads(tmp_path)
    assert isinstance(series, LoadSeries)
    assert series.steps.tolist() == counts.tolist()


def test_refusals_of_dumps(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"records": []}, path)
    assert "no last_physical_to_logical_map in it" in refusal(read_loads, path)
    torch.save({"records": [], "last_physical_to_logical_map": SLOTS}, path)
    assert "an empty one" in refusal(read_loads, path)
    dump(path, 0, {1: [[1, 2], [3, 4]]})
    assert "records[0].global_physical_count: type int32 and shape [2, 2], must be" in refusal(read_loads, path)
    dump(path, 0, {1: [[-1, 2, 3, 4], [3, 4, 5, 6]]})
    assert "a count of -1, must be at least 0" in refusal(read_loads, path)
    dump(path, 0, FIRST, slots=torch.tensor([[0, 1, 3, 0], [2, 1, 0, 1]]))
    assert "no slot for expert 2 in layer 0" in refusal(read_loads, path)
    torch.save({"records": [{"rank": 0}], "last_physical_to_logical_map": SLOTS}, path)
    assert "no forward_pass_id in records[0]" in refusal(read_loads, path)
    same = torch.ones(2, 4, dtype=torch.int32)
    records = [{"forward_pass_id": n, "rank": 0, "global_physical_count": same} for n in range(3)]
    torch.save({"records": records, "last_physical_to_logical_map": SLOTS}, path)
    assert "records[1].global_physical_count: the same numbers as in an earlier" in refusal(read_loads, path)


def test_refusals_of_folders(tmp_path: Path) -> None:
    assert "a folder without meta_info.json and without .pt files" in refusal(read_loads, tmp_path)
    dump(tmp_path / "a.pt", 0, FIRST)
    dump(tmp_path / "b.pt", 0, FIRST)
    assert "rank 0, which another file is of" in refusal(read_loads, tmp_path)
    dump(tmp_path / "b.pt", 1, FIRST, slots=SLOTS.flip(0))
    assert "another last_physical_to_logical_map than in a.pt" in refusal(read_loads, tmp_path)
    dump(tmp_path / "b.pt", 1, {9: FIRST[4]})
    assert "no pass that every file has a record of" in refusal(read_loads, tmp_path)


def safetensors(path: Path, tensors: dict[str, list[int]], dtype: str = "I64") -> None:
    """The file by hand, as its format says: the length of a JSON header, the header, the numbers."""
    header, at, body = {}, 0, b""
    for name, values in tensors.items():
        data = np.array(values, dtype={"I64": "<i8", "F32": "<f4"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [at, at + len(data)]}
        at, body = at + len(data), body + data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    write_text(tmp_path / "meta_info.json", {"num_experts": 3, "num_experts_per_token": 2})
    safetensors(
        tmp_path / "rank0.safetensors", {"10_3": [1, 2, 3], "10_4": [4, 5, 6], "9_3": [7, 8, 9], "9_4": [1, 1, 1]}
    )
    safetensors(
        tmp_path / "rank1.safetensors", {"9_4": [1, 0, 0], "9_3": [0, 1, 0], "10_3": [0, 0, 1], "10_4": [2, 2, 2]}
    )
    return tmp_path


def test_statistics_are_summed_over_ranks_in_order_of_iterations(statistics: Path) -> None:
    recording = read_loads(statistics)
    assert isinstance(recording, LoadSeries)
    assert recording.steps.tolist() == [[[7, 9, 9], [2, 1, 1]], [[1, 2, 4], [6, 7, 8]]]
    assert recording.notes == ("layers 3 to 4 of the model, summed over 2 ranks",)


def test_refusals_of_statistics(statistics: Path) -> None:
    last = statistics / "rank1.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-3])
    assert "content that does not read as .safetensors" in str(refusal(read_loads, statistics))
    safetensors(last, {"9_3": [0, 1, 0]})
    assert "9_4 in rank0.safetensors and not in rank1.safetensors, must be in every rank's" in refusal(
        read_loads, statistics
    )
    safetensors(last, {"nine": [0, 1, 0]})
    assert "a tensor 'nine', must be called ITERATION_LAYER" in refusal(read_loads, statistics)
    safetensors(last, {"9_3": [0, 1]})
    assert "9_3 of type int64 and shape [2], must be integers [3]" in refusal(read_loads, statistics)
    safetensors(last, {"9_3": [0, 1, 0]}, "F32")
    assert "9_3 of type float32" in refusal(read_loads, statistics)
    safetensors(last, {"9_3": [0, -1, 0]})
    assert "9_3 with a count of -1" in refusal(read_loads, statistics)
    last.write_bytes(whole)
    last.rename(statistics / "rank2.safetensors")
    assert "no rank1.safetensors" in refusal(read_loads, statistics)
    write_text(statistics / "meta_info.json", {"num_experts": 4})
    assert "num_experts=4, must be 3" in refusal(read_loads, statistics, num_experts=3)
    write_text(statistics / "meta_info.json", {})
    assert "no num_experts in it" in refusal(read_loads, statistics)
