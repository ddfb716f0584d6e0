"""vllm-ascend: an expert map as .json, the experts of every device of every layer.

It is read by position, so that numbers that are no positions would be taken for others, and two replicas of an expert
on a device become one: both are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eplb_triton.formats.atomic import write_whole
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.slot_map import SlotMap, checked_map, integer, refuse_other_keys
from eplb_triton.placement import Placement

NAME = "vllm-ascend"
SUFFIXES = (".json",)
KEYS = ("moe_layer_count", "layer_list")
LAYER_KEYS = ("layer_id", "device_count", "device_list")
DEVICE_KEYS = ("device_id", "device_expert")
EXPECTED = "a vllm-ascend expert map: moe_layer_count and layer_list"


def from_content(path: Path, content: dict[str, Any], num_experts: int | None) -> SlotMap:
    """The map in what a file holds.

    Raises:
        FormatError: a key too many or too few, a number that is no position, devices of different sizes, two replicas
            of an expert on a device, or no map of every expert.
    """
    refuse_other_keys(path, EXPECTED, content, KEYS)
    layers = _list(path, "layer_list", content["layer_list"])
    integer(path, EXPECTED, "moe_layer_count", content["moe_layer_count"], rule=len(layers))
    rows, num_gpus = [], None
    for index, layer in enumerate(layers):
        where = f"layer_list[{index}]"
        refuse_other_keys(path, EXPECTED, layer, LAYER_KEYS, where)
        integer(path, EXPECTED, f"{where}.layer_id", layer["layer_id"], rule=index)
        devices = _list(path, f"{where}.device_list", layer["device_list"])
        num_gpus = num_gpus or len(devices)
        integer(path, EXPECTED, f"{where}.device_count", layer["device_count"], rule=num_gpus)
        integer(path, EXPECTED, f"devices in {where}", len(devices), rule=num_gpus)
        rows.append(
            [expert for at, device in enumerate(devices) for expert in _experts(path, where, at, device, devices)]
        )
    return SlotMap(path, NAME, *checked_map(path, EXPECTED, "device_expert", rows, num_experts), num_gpus)


def _experts(path: Path, where: str, at: int, device: Any, devices: list[Any]) -> list[Any]:
    """The experts of a device, as many as the first has."""
    where = f"{where}.device_list[{at}]"
    refuse_other_keys(path, EXPECTED, device, DEVICE_KEYS, where)
    integer(path, EXPECTED, f"{where}.device_id", device["device_id"], rule=at)
    experts = _list(path, f"{where}.device_expert", device["device_expert"])
    integer(path, EXPECTED, f"experts in {where}", len(experts), rule=len(devices[0]["device_expert"]))
    seen = set()
    for expert in experts:
        integer(path, EXPECTED, f"{where}.device_expert", expert)
        if expert in seen:
            raise FormatError(path, EXPECTED, f"expert {expert} twice in {where}, must be once a device")
        seen.add(expert)
    return experts


def _list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError(path, EXPECTED, f"{name} of type {type(value).__name__}, must be a list that is not empty")
    return value


def write(path: Path, placement: Placement) -> None:
    """Write a checked placement.

    Raises:
        FormatError: an expert has two replicas on a GPU, or the file cannot be written.
    """
    topology = placement.topology
    by_gpu = placement.phy2log.view(placement.num_layers, topology.num_gpus, topology.slots_per_gpu).cpu()
    ordered = by_gpu.sort(2).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(twice):
        layer, gpu, slot = twice[0].tolist()
        raise FormatError(
            path,
            "a placement that vllm-ascend can express",
            f"expert {int(ordered[layer, gpu, slot])} twice on GPU {gpu} in layer {layer}, must be once a device",
        )
    layers = [
        {
            "layer_id": index,
            "device_count": topology.num_gpus,
            "device_list": [{"device_id": gpu, "device_expert": experts} for gpu, experts in enumerate(devices)],
        }
        for index, devices in enumerate(by_gpu.tolist())
    ]
    write_whole(path, f"{json.dumps({'moe_layer_count': len(layers), 'layer_list': layers})}\n".encode())
