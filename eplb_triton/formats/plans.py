"""Plan files: a placement with its topology, as .npz, .pt or .json."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from eplb_triton.formats.arrays import as_array, read_named
from eplb_triton.formats.atomic import check_writable, write_whole
from eplb_triton.formats.errors import FormatError
from eplb_triton.placement import Placement
from eplb_triton.printing import shown
from eplb_triton.topology import Topology

FORMAT_VERSION = 1
PLAN_SUFFIXES = (".npz", ".pt", ".json")
EXPECTED = "a plan written by `eplb-triton plan`, in a .npz, .pt or .json file"

_TOPOLOGY = ("num_replicas", "num_groups", "num_nodes", "num_gpus")
_COUNTS = ("format_version", "num_experts", *_TOPOLOGY)
_MAPS = {"phy2log": 2, "phyrank": 2, "logcnt": 2, "log2phy": 3}  # name -> dimensions


@dataclass(frozen=True, eq=False)
class PlanFile:
    """A plan as a file has it; `placement` says whether it holds.

    Args:
        path: the file.
        policy: name of the policy that made the plan.
        num_experts: E.
        topology: the four counts of a Topology, by name.
        phy2log, phyrank: [L, P] int64, expert of each slot and rank of its replica within the expert.
        logcnt: [L, E] int64, replicas of each expert.
        log2phy: [L, E, P - E + 1] int64, slots of each expert by rank, padded with -1; None if left out.
    """

    path: Path
    policy: str
    num_experts: int
    topology: dict[str, int]
    phy2log: torch.Tensor
    phyrank: torch.Tensor
    logcnt: torch.Tensor
    log2phy: torch.Tensor | None

    def placement(self) -> Placement:
        """The placement, every invariant of which was checked.

        Raises:
            ValueError: what is wrong with the plan, and in which layer; the text begins with the file's name.
        """
        try:
            topology = Topology(**self.topology)
            topology.check_experts(self.num_experts)
            experts = self.logcnt.shape[1]
            if experts != self.num_experts:
                raise ValueError(f"logcnt is of {experts} experts a layer, num_experts={self.num_experts}")
            placement = Placement(self.phy2log, self.phyrank, self.logcnt, topology, self.policy)
            placement.validate()
            self._check_log2phy(placement)
        except ValueError as error:
            raise ValueError(f"{shown(self.path)}: {error}") from error
        return placement

    def _check_log2phy(self, placement: Placement) -> None:
        if self.log2phy is None:
            return
        shape = placement.topology.map_shapes(placement.num_layers, placement.num_experts)["log2phy"]
        if tuple(self.log2phy.shape) != shape:  # before it is built, which takes gigabytes where the counts say so
            raise ValueError(f"log2phy is of shape {list(self.log2phy.shape)}, must be {list(shape)}")
        built = placement.slots_of_experts()
        wrong = (self.log2phy != built).nonzero()
        if len(wrong):
            layer, expert, rank = wrong[0].tolist()
            raise ValueError(
                f"log2phy[{layer}, {expert}, {rank}] is {int(self.log2phy[layer, expert, rank])}, must be "
                f"{int(built[layer, expert, rank])} to agree with phy2log"
            )


def check_plan_path(path: Path) -> None:
    """Refuse a path that `write_plan` could not write to, before any work is done.

    Raises:
        FormatError: unknown suffix, or see `check_writable`.
    """
    if path.suffix.lower() not in PLAN_SUFFIXES:
        found = f"a name that ends in {path.suffix or 'no suffix'!r}"
        raise FormatError(path, f"an output file that ends in {', '.join(PLAN_SUFFIXES)}", found)
    check_writable(path)


def write_plan(path: Path, placement: Placement, *, log2phy: bool = True) -> None:
    """Write a plan to a .npz (compressed), .pt or .json file, whole or not at all.

    The file has the names `format_version`, `policy`, `num_experts`, `num_replicas`, `num_groups`, `num_nodes`,
    `num_gpus`, and int64 `phy2log` [L, P], `phyrank` [L, P], `logcnt` [L, E], `log2phy` [L, E, P - E + 1].

    Args:
        path: where; a file that is there is replaced once the new one is complete.
        placement: what.
        log2phy: also write log2phy, which has E (P - E + 1) entries a layer and follows from the rest.

    Raises:
        FormatError: unknown suffix, or the file cannot be written.
        ValueError: the placement has no layers.
    """
    check_plan_path(path)
    if placement.num_layers == 0:
        raise ValueError("placement has 0 layers, must have at least 1 to be written")
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "policy": placement.policy,
        "num_experts": placement.num_experts,
        **{name: getattr(placement.topology, name) for name in _TOPOLOGY},
        "phy2log": placement.phy2log.cpu(),
        "phyrank": placement.phyrank.cpu(),
        "logcnt": placement.logcnt.cpu(),
    }
    if log2phy:
        content["log2phy"] = placement.slots_of_experts().cpu()
    file = io.BytesIO()
    {".npz": _write_npz, ".pt": _write_pt, ".json": _write_json}[path.suffix.lower()](file, content)
    write_whole(path, file.getvalue())


def _write_npz(file: BinaryIO, content: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in content.items()}
    np.savez_compressed(file, **arrays)


def _write_pt(file: BinaryIO, content: dict[str, Any]) -> None:
    # clone: a view would take the whole storage behind it into the file
    torch.save({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in content.items()}, file)


def _write_json(file: BinaryIO, content: dict[str, Any]) -> None:
    """One line a layer, so that a person can read it and two plans can be compared with diff."""
    for index, (name, value) in enumerate(content.items()):
        file.write(b"{\n" if index == 0 else b",\n")
        file.write(f"{json.dumps(name)}: ".encode())
        if isinstance(value, torch.Tensor):
            for layer, rows in enumerate(value):
                file.write(b"[\n" if layer == 0 else b",\n")
                file.write(json.dumps(rows.tolist()).encode())
            file.write(b"\n]")
        else:
            file.write(json.dumps(value).encode())
    file.write(b"\n}\n")


def read_plan(path: Path) -> PlanFile:
    """Read a plan file. What the maps say is not checked here: `PlanFile.placement` does that.

    Raises:
        FormatError: the file cannot be read, lacks a part, or a part is of the wrong type or number of dimensions.
    """
    required = [*_COUNTS, "policy", "phy2log", "phyrank", "logcnt"]

    def pick(names: Sequence[str]) -> list[str]:
        missing = [name for name in required if name not in names]
        if missing:
            raise FormatError(path, EXPECTED, f"no {', '.join(missing)} in it")
        return [*required, *(["log2phy"] if "log2phy" in names else [])]

    content = read_named(path, PLAN_SUFFIXES, EXPECTED, pick)
    try:
        counts = {name: _integer(name, content[name]) for name in _COUNTS}
        maps = {name: _map(name, content[name]) for name in _MAPS if name in content}
        policy = content["policy"].item() if isinstance(content["policy"], np.ndarray) else content["policy"]
        if not isinstance(policy, str):
            raise ValueError(f"policy of type {type(policy).__name__}, which is no name")
        if counts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {counts['format_version']}, this program knows {FORMAT_VERSION}")
    except (ValueError, RecursionError) as error:
        raise FormatError(path, EXPECTED, str(error)) from error
    return PlanFile(
        path=path,
        policy=policy,
        num_experts=counts["num_experts"],
        topology={name: counts[name] for name in _TOPOLOGY},
        phy2log=maps["phy2log"],
        phyrank=maps["phyrank"],
        logcnt=maps["logcnt"],
        log2phy=maps.get("log2phy"),
    )


def _integer(name: str, value: Any) -> int:
    try:
        array = as_array(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if array.ndim or array.dtype.kind not in "iu":
        raise ValueError(f"{name} of type {array.dtype} and shape {list(array.shape)}, which is no integer")
    return int(array)


def _map(name: str, value: Any) -> torch.Tensor:
    try:
        array = as_array(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if array.ndim != _MAPS[name] or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} of type {array.dtype} and shape {list(array.shape)}, must be integers in {_MAPS[name]} dimensions"
        )
    return torch.from_numpy(array.astype(np.int64))
