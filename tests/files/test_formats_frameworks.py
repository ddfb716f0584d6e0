"""Files of the serving frameworks: written here by hand as they write them, read, written back, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eplb_triton import Placement, Topology, plan
from eplb_triton.formats import SUFFIXES_OF, FormatError, SlotMap, read_map, write_map
from eplb_triton.synthetic import lognormal_series
from tests.recordings import refusal, write_text

TOPOLOGY = Topology(num_replicas=12, num_gpus=4)
PLACEMENT = plan(lognormal_series(1, 3, 8, seed=1)[0], TOPOLOGY, backend="reference")
MAP = PLACEMENT.phy2log.tolist()
OF_DEVICES = [
    {
        "layer_id": layer,
        "device_count": 4,
        "device_list": [{"device_id": gpu, "device_expert": row[3 * gpu : 3 * gpu + 3]} for gpu in range(4)],
    }
    for layer, row in enumerate(MAP)
]
ASCEND = {"moe_layer_count": 3, "layer_list": OF_DEVICES}
YAML = "num_slots: 12\ninitial_global_assignments:\n" + "".join(
    f"  {layer + 3}:\n" + "".join(f"    - {expert}\n" for expert in row) for layer, row in enumerate(MAP)
)
YAML += "layer_updates_per_iter: 1\n"

pytest.importorskip("yaml")
pytest.importorskip("safetensors")


def changed(content: Any, where: list[Any], value: Any) -> Any:
    """A copy of nested lists and dicts with one value replaced, or left out for None."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in where[:-1]:
        inner = inner[key]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return copy


# placements


@pytest.mark.parametrize(
    ("name", "content", "form", "gpus"),
    [
        ("sglang.json", {"physical_to_logical_map": MAP}, "sglang", None),
        ("vllm.json", MAP, "vllm", None),
        ("ascend.json", ASCEND, "vllm-ascend", 4),
        ("trt.yaml", YAML, "tensorrt-llm", None),
    ],
)
def test_a_file_as_the_framework_writes_it(
    tmp_path: Path, name: str, content: Any, form: str, gpus: int | None
) -> None:
    stored = read_map(write_text(tmp_path / name, content))
    assert isinstance(stored, SlotMap)
    assert (stored.format, stored.num_experts, stored.num_gpus) == (form, 8, gpus)
    assert stored.phy2log.tolist() == MAP
    assert stored.first_layer == (3 if form == "tensorrt-llm" else 0)


def test_sglang_as_a_tensor(tmp_path: Path) -> None:
    torch.save({"physical_to_logical_map": PLACEMENT.phy2log.to(torch.int32)}, tmp_path / "x.pt")
    stored = read_map(tmp_path / "x.pt")
    assert isinstance(stored, SlotMap)
    assert stored.phy2log.tolist() == MAP


@pytest.mark.parametrize(("to", "suffix"), [(to, suffix) for to, all_of in SUFFIXES_OF.items() for suffix in all_of])
def test_a_round_trip_of_every_format(tmp_path: Path, to: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write_map(path, PLACEMENT, to, first_layer=3)
    stored = read_map(path)
    again = stored.placement(TOPOLOGY) if isinstance(stored, SlotMap) else stored.placement()
    assert torch.equal(again.phy2log, PLACEMENT.phy2log)
    assert again.num_experts == 8
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_written_has_the_fields_of_the_framework(tmp_path: Path) -> None:
    write_map(tmp_path / "s.json", PLACEMENT, "sglang")
    assert json.loads((tmp_path / "s.json").read_text()) == {"physical_to_logical_map": MAP}
    write_map(tmp_path / "v.json", PLACEMENT, "vllm")
    assert json.loads((tmp_path / "v.json").read_text()) == MAP
    write_map(tmp_path / "a.json", PLACEMENT, "vllm-ascend")
    assert json.loads((tmp_path / "a.json").read_text()) == ASCEND
    write_map(tmp_path / "s.pt", PLACEMENT, "sglang")
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(content) == ["physical_to_logical_map"]
    write_map(tmp_path / "t.yaml", PLACEMENT, "tensorrt-llm", first_layer=3)
    lines = (tmp_path / "t.yaml").read_text().splitlines()
    assert lines[:3] == ["num_slots: 12", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    assert lines[3:] == [f"  {layer + 3}: {row}" for layer, row in enumerate(MAP)]


def lacking() -> list[list[int]]:
    """`MAP` without expert 5 in layer 1."""
    return [[4 if (layer, expert) == (1, 5) else expert for expert in row] for layer, row in enumerate(MAP)]


FURTHER = {"physical_to_logical_map": MAP, "logical_count": [[1] * 8] * 3}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.json", lacking(), "no slot for expert 5 in layer 1, must be at least one"),
        ("x.json", {"physical_to_logical_map": lacking()}, "physical_to_logical_map: no slot for expert 5 in layer 1"),
        ("x.json", FURTHER, "a further key 'logical_count', must have physical_to_logical_map alone"),
        ("x.json", {"logical_count": [[1]]}, "logical_count, which are loads"),
        ("x.json", changed(MAP, [0, 2], -1), "expert -1 at [layer 0, slot 2], must be 0 to 7"),
        ("x.json", changed(MAP, [2, 0], 2**60), f"expert {2**60} at [layer 2, slot 0], must be 0 to 11: 12 slots"),
        ("x.json", changed(MAP, [2], [0, 1]), "ragged rows: [2] is of shape [2]"),
        ("x.json", [1, 2, 3], "type int64 and shape [3], must be integers [layers, slots]"),
        ("x.json", changed(MAP, [0, 0], 0.5), "must be integers [layers, slots]"),
        ("x.json", {"other": 1}, "other"),
        ("x.json", "[[0, ", "content that does not read as .json"),
        ("x.txt", "", "a name that ends in '.txt'"),
        ("x.json", {**ASCEND, "more": 1}, "a further key 'more', must have moe_layer_count, layer_list alone"),
        ("x.json", {**ASCEND, "moe_layer_count": 4}, "moe_layer_count=4, must be 3"),
        ("x.json", {"moe_layer_count": 0, "layer_list": []}, "layer_list of type list, must be a list that is not"),
        ("x.json", changed(ASCEND, ["layer_list", 1, "layer_id"], 7), "layer_list[1].layer_id=7, must be 1"),
        ("x.json", changed(ASCEND, ["layer_list", 1, "device_count"], 3), "layer_list[1].device_count=3, must be 4"),
        ("x.json", changed(ASCEND, ["layer_list", 0, "device_list", 2, "device_id"], 1), "device_id=1, must be 2"),
        (
            "x.json",
            changed(ASCEND, ["layer_list", 0, "device_list", 2, "device_expert"], [3, 3, 4]),
            "expert 3 twice in layer_list[0].device_list[2], must be once a device",
        ),
        (
            "x.json",
            changed(ASCEND, ["layer_list", 0, "device_list", 2, "device_expert"], [3, 4]),
            "experts in layer_list[0].device_list[2]=2, must be 3",
        ),
        (
            "x.json",
            changed(ASCEND, ["layer_list", 0, "device_list", 2, "device_expert"], [3, 4, "a"]),
            "device_expert=a",
        ),
        ("x.yaml", YAML + "more: 1\n", "a further key 'more', must have num_slots"),
        ("x.yaml", YAML.replace("num_slots: 12", "num_slots: 13"), "experts of layer 3=12, must be 13"),
        ("x.yaml", YAML.replace("num_slots: 12\n", ""), "no num_slots"),
        ("x.yaml", YAML.replace("  4:\n", "  9:\n"), "no layer 4 in initial_global_assignments"),
        ("x.yaml", YAML.replace("  4:\n", "  3:\n"), "a key that stands twice, in what begins on line 3"),
        ("x.yaml", YAML.replace("  4:\n", "  0x3:\n"), "a key that stands twice, in what begins on line 3"),
        ("x.yaml", YAML.replace("  4:\n", "  four:\n"), "a layer of initial_global_assignments=four"),
        ("x.yaml", "num_slots: &a [1]\nlayer_updates_per_iter: *a\n", "an alias on line 2, must be written out"),
        ("x.yaml", "a: !!python/object/apply:os.getcwd []\n", "content that does not read as .yaml: ConstructorError"),
        ("x.yaml", "num_slots: [\n", "content that does not read as .yaml"),
        ("x.yaml", "", "an empty file"),
    ],
)
def test_refusals_of_placements(tmp_path: Path, name: str, content: Any, text: str) -> None:
    assert text in refusal(read_map, write_text(tmp_path / name, content))


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"physical_to_logical_map": Path("x")}, tmp_path / "x.pt")
    assert "torch.load(weights_only=True) refuses it" in refusal(read_map, tmp_path / "x.pt")


def test_a_few_numbers_that_stand_for_many_are_refused(tmp_path: Path) -> None:
    torch.save(
        {"physical_to_logical_map": torch.zeros(1, 1, dtype=torch.int64).expand(10**6, 10**6)}, tmp_path / "x.pt"
    )
    assert "a view of shape" in refusal(read_map, tmp_path / "x.pt")


def test_the_number_of_experts_can_be_said(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.json", MAP)
    assert "no slot for expert 8 in layer 0" in refusal(read_map, path, num_experts=9)
    assert "must be 0 to 6" in refusal(read_map, path, num_experts=7)
    assert "12 slots a layer, must be at least 1000000000000" in refusal(read_map, path, num_experts=10**12)


def test_writers_refuse_what_frameworks_would_take(tmp_path: Path) -> None:
    partial = Placement.from_phy2log(torch.tensor([[0, 1, 1, 0]]), 3, Topology(num_replicas=4, num_gpus=2))
    for to, suffixes in SUFFIXES_OF.items():
        with pytest.raises(ValueError, match="expert 2"):
            write_map(tmp_path / f"x{suffixes[0]}", partial, to)
    double = Placement.from_phy2log(torch.tensor([[0, 1, 2, 2]]), 3, Topology(num_replicas=4, num_gpus=2))
    with pytest.raises(FormatError, match=r"found expert 2 twice on GPU 1 in layer 0, must be once a device"):
        write_map(tmp_path / "x.json", double, "vllm-ascend")
    with pytest.raises(
        FormatError, match=r"ends in \.yaml, \.yml for tensorrt-llm; found a name that ends in '\.json'"
    ):
        write_map(tmp_path / "x.json", double, "tensorrt-llm")
    assert list(tmp_path.iterdir()) == []


# loads: SGLang's recorder


# loads: TensorRT-LLM
