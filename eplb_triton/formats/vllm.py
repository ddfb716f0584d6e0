"""vLLM: a JSON list [L][P] of the expert in each slot, as proposals for an initial placement have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eplb_triton.formats.arrays import NAMELESS
from eplb_triton.formats.atomic import write_whole
from eplb_triton.formats.slot_map import SlotMap, checked_map, rows_as_json
from eplb_triton.placement import Placement

NAME = "vllm"
SUFFIXES = (".json",)
EXPECTED = "a list of layers, each a list of the expert in every slot"


def from_content(path: Path, content: dict[str, Any], num_experts: int | None) -> SlotMap:
    """The map in what a file holds.

    Raises:
        FormatError: no map of every expert.
    """
    return SlotMap(path, NAME, *checked_map(path, EXPECTED, "", content[NAMELESS], num_experts))


def write(path: Path, placement: Placement) -> None:
    """Write a checked placement.

    Raises:
        FormatError: the file cannot be written.
    """
    write_whole(path, f"{rows_as_json(placement.phy2log)}\n".encode())
