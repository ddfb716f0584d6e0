"""What the placement files of the frameworks share: the expert in every slot, and rules that hold in all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eplb_triton.formats.arrays import Array, as_array
from eplb_triton.formats.errors import FormatError
from eplb_triton.placement import Placement
from eplb_triton.topology import Topology


@dataclass(frozen=True, eq=False)
class SlotMap:
    """A placement as a framework's file has it; every expert below the largest has a slot.

    Args:
        path: the file.
        format: its name, as `eplb-triton convert --to` takes it.
        phy2log: [L, P] int64, expert in each physical slot.
        num_experts: E.
        num_gpus: D, where the file says so.
        first_layer: number of the first layer in the model, where the file says so.
    """

    path: Path
    format: str
    phy2log: torch.Tensor
    num_experts: int
    num_gpus: int | None = None
    first_layer: int = 0

    def placement(self, topology: Topology) -> Placement:
        """The placement on a cluster, checked.

        Raises:
            FormatError: the map is no plan of this topology; which layer and slot break which rule.
        """
        try:
            placement = Placement.from_phy2log(self.phy2log, self.num_experts, topology, self.format)
            placement.validate()
        except ValueError as error:
            raise FormatError(self.path, "a plan of the counts given", str(error)) from error
        return placement


def checked_map(path: Path, expected: str, name: str, value: Any, num_experts: int | None) -> tuple[torch.Tensor, int]:
    """phy2log [L, P] int64 and E, from an array or nested list; E is the largest expert + 1 where nobody says.

    Raises:
        FormatError: `name` is not [layers, slots] of integers, names an expert outside 0 … E - 1, or lacks one.
    """
    try:
        array = as_array(value)
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.size == 0:
            raise ValueError(f"type {array.dtype} and shape {list(array.shape)}, must be integers [layers, slots]")
        experts = _experts_of(array, num_experts)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, expected, f"{name}: {error}" if name else str(error)) from error
    return torch.from_numpy(array.astype(np.int64)), experts


def _experts_of(slots: Array, num_experts: int | None) -> int:
    """E, once every expert was seen in every layer; ties: the first layer, then the first slot or expert."""
    num_slots = slots.shape[1]
    experts = int(slots.max()) + 1 if num_experts is None else num_experts
    if num_experts is not None and num_experts > num_slots:
        raise ValueError(f"{num_slots} slots a layer, must be at least {num_experts}, one for every expert")
    limit = min(experts, num_slots)  # a number beyond the slots leaves others without one, and would only take memory
    bad = (slots < 0) | (slots >= limit)
    if bad.any():
        layer, slot = (int(index) for index in np.unravel_index(np.argmax(bad), bad.shape))
        rule = f"{num_slots} slots hold at most experts 0 to {num_slots - 1}" if limit < experts else ""
        raise ValueError(
            f"expert {slots[layer, slot]} at [layer {layer}, slot {slot}], must be 0 to {limit - 1}"
            f"{f': {rule}' if rule else ''}"
        )
    held = np.zeros((len(slots), experts), dtype=bool)
    np.put_along_axis(held, slots.astype(np.int64), True, axis=1)
    if not held.all():
        layer, expert = (int(index) for index in np.unravel_index(np.argmin(held), held.shape))
        raise ValueError(f"no slot for expert {expert} in layer {layer}, must be at least one: its tokens would vanish")
    return experts


def refuse_other_keys(path: Path, expected: str, found: Any, known: tuple[str, ...], where: str = "") -> None:
    """Refuse what is no mapping of exactly the known names.

    Raises:
        FormatError: names the first key that is missing or that no reader takes.
    """
    behind = f" in {where}" if where else ""
    if not isinstance(found, dict):
        raise FormatError(path, expected, f"a {type(found).__name__}{behind}, must have {', '.join(known)}")
    for name in known:
        if name not in found:
            raise FormatError(path, expected, f"no {name}{behind}")
    for name in found:
        if name not in known:
            raise FormatError(path, expected, f"a further key {name!r}{behind}, must have {', '.join(known)} alone")


def integer(path: Path, expected: str, name: str, value: Any, rule: int | None = None, lowest: int = 0) -> int:
    """`value` as an integer of at least `lowest`, and equal to `rule` where that is given.

    Raises:
        FormatError: it is another.
    """
    if type(value) is not int or value < lowest:
        raise FormatError(path, expected, f"{name}={str(value)[:40]!s}, must be an integer of at least {lowest}")
    if rule is not None and value != rule:
        raise FormatError(path, expected, f"{name}={value}, must be {rule}")
    return value


def rows_as_json(rows: torch.Tensor) -> str:
    """A list of lists, one line a row, so that two files can be compared line by line."""
    return "[\n" + ",\n".join(str(row) for row in rows.tolist()) + "\n]"
