"""SGLang: the file of `--init-expert-location`, `physical_to_logical_map` [L, P] as .json or .pt.

SGLang hands every further key to a function that does not take it, and accepts a map that lacks an expert: both are
refused here. `logical_count` in place of the map holds loads, which `read_loads` takes.
Source: sglang/srt/eplb/expert_location.py, `compute_initial_expert_location_metadata`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from eplb_triton.formats.atomic import write_whole
from eplb_triton.formats.slot_map import SlotMap, checked_map, refuse_other_keys, rows_as_json
from eplb_triton.placement import Placement

NAME = "sglang"
SUFFIXES = (".json", ".pt")
KEY = "physical_to_logical_map"
EXPECTED = f"SGLang's expert location, {KEY} [layers, slots] alone"


def from_content(path: Path, content: dict[str, Any], num_experts: int | None) -> SlotMap:
    """The map in what a file holds.

    Raises:
        FormatError: a further key, or no map of every expert.
    """
    refuse_other_keys(path, EXPECTED, content, (KEY,))
    return SlotMap(path, NAME, *checked_map(path, EXPECTED, KEY, content[KEY], num_experts))


def write(path: Path, placement: Placement) -> None:
    """Write a checked placement for `--init-expert-location`.

    Raises:
        FormatError: the file cannot be written.
    """
    slots = placement.phy2log.to("cpu", torch.int64, copy=True)
    if path.suffix.lower() == ".pt":
        file = io.BytesIO()
        torch.save({KEY: slots}, file)
        write_whole(path, file.getvalue())
    else:
        write_whole(path, f'{{"{KEY}": {rows_as_json(slots)}}}\n'.encode())
