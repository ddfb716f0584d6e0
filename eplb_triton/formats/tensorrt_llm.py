"""TensorRT-LLM: the YAML of its load balancer, `initial_global_assignments` by number of the layer in the model.

The reader is strict and so is this one: three keys, no other. PyYAML (the extra `formats`) reads; nothing but this
module's own text is needed to write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eplb_triton.formats.arrays import Pick, choose, read_named
from eplb_triton.formats.atomic import write_whole
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.slot_map import SlotMap, checked_map, integer, refuse_other_keys
from eplb_triton.placement import Placement

NAME = "tensorrt-llm"
SUFFIXES = (".yaml", ".yml")
KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")
EXPECTED = f"TensorRT-LLM's load balancer config: {', '.join(KEYS)}"
INSTALL = "pip install 'eplb-triton[formats]'"


def read(path: Path, num_experts: int | None) -> SlotMap:
    """The map in a .yaml or .yml file.

    Raises:
        FormatError: PyYAML is missing; the file cannot be read; a key too many or too few; layers that do not follow
            each other; no map of every expert.
    """
    content = read_named(path, SUFFIXES, EXPECTED, lambda names: names, dict.fromkeys(SUFFIXES, _read_yaml))
    refuse_other_keys(path, EXPECTED, content, KEYS)
    num_slots = integer(path, EXPECTED, "num_slots", content["num_slots"], lowest=1)
    integer(path, EXPECTED, "layer_updates_per_iter", content["layer_updates_per_iter"])
    layers = content["initial_global_assignments"]
    if not isinstance(layers, dict) or not layers:
        found = f"initial_global_assignments of type {type(layers).__name__}"
        raise FormatError(path, EXPECTED, f"{found}, must map layers to lists of experts")
    for number in layers:
        integer(path, EXPECTED, "a layer of initial_global_assignments", number)
    first = min(layers)
    rows = []
    for number in range(first, first + len(layers)):
        if number not in layers:
            raise FormatError(
                path, EXPECTED, f"no layer {number} in initial_global_assignments, must follow each other"
            )
        row = layers[number]
        if not isinstance(row, list):
            raise FormatError(path, EXPECTED, f"layer {number} of type {type(row).__name__}, must be a list of experts")
        integer(path, EXPECTED, f"experts of layer {number}", len(row), rule=num_slots)
        rows.append(row)
    slots = checked_map(path, EXPECTED, "initial_global_assignments", rows, num_experts)
    return SlotMap(path, NAME, *slots, first_layer=first)


def write(path: Path, placement: Placement, first_layer: int = 0) -> None:
    """Write a checked placement, one that stays: `layer_updates_per_iter` is 0.

    Args:
        path: where.
        placement: what.
        first_layer: number of its first layer in the model; the others follow.

    Raises:
        FormatError: the file cannot be written.
    """
    lines = [f"num_slots: {placement.topology.num_replicas}", "layer_updates_per_iter: 0", f"{KEYS[1]}:"]
    lines += [f"  {first_layer + layer}: {row}" for layer, row in enumerate(placement.phy2log.tolist())]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def _read_yaml(path: Path, pick: Pick) -> dict[str, Any]:
    try:
        import yaml  # noqa: PLC0415 - the extra may be missing
    except ModuleNotFoundError:
        raise FormatError(path, EXPECTED, f"no PyYAML to read it: {INSTALL}") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML ships no types
        """Safe, and without what YAML allows and the format does not need."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them fill any memory
                raise ValueError(f"an alias on line {self.peek_event().start_mark.line + 1}, must be written out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):  # the last would count
                raise ValueError(f"a key that stands twice, in what begins on line {node.start_mark.line + 1}")
            return mapping

    return choose(yaml.load(path.read_text(encoding="utf-8-sig"), Loader), pick)
