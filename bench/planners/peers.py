"""Planners people use today, loaded from the modules that `make peers` unpacked, without their packages."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.planners.fetch import FOLDER, MANIFEST
from bench.planners.ours import PUBLISHED, Call, Planner, Skip, one_line
from eplb_triton import Placement, Topology

VLLM = "vllm"
"""The planner every time is compared with."""


def peers(folder: Path = FOLDER) -> tuple[list[Planner], list[Skip]]:
    """Every peer that can be loaded from `folder`, and why the others cannot."""
    found, skips = [], []
    manifest = _manifest(folder)
    for name, (package, load) in _LOADERS.items():
        if package not in manifest:
            skips.append(Skip(name, f"{package} is not there: `make peers` fetches it"))
            continue
        try:
            found.append(load(name, folder / package, f"{package} {manifest[package]['version']}"))
        except Exception as error:  # whatever a foreign module raises at import is a line of the report
            skips.append(Skip(name, one_line(error)))
    return found, skips


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    fetched: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return fetched


def _module(folder: Path, name: str) -> ModuleType:
    """The module folder/name.py, in a package made up in memory so that its relative imports find its siblings."""
    package = f"bench_peer_{folder.name.replace('-', '_')}"
    if package not in sys.modules:
        parent = ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    spec = importlib.util.spec_from_file_location(f"{package}.{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{package}.{name}"] = module
    spec.loader.exec_module(module)
    return module


def _vllm(name: str, folder: Path, source: str) -> Planner:
    return _vllm_planner(name, _module(folder, "default").DefaultEplbPolicy, source)


def _vllm_planner(name: str, policy: Any, source: str) -> Planner:
    def bind(loads: Tensor, topology: Topology) -> Call:
        return lambda: policy.rebalance_experts(loads, *_counts(topology))

    def bind_after(loads: Tensor, topology: Topology, previous: Placement) -> Call:
        return lambda: policy.rebalance_experts(loads, *_counts(topology), previous.phy2log)

    return Planner(name, PUBLISHED, bind, lambda maps: maps, "[L, E] float32", "phy2log", source, bind_after)


def _counts(topology: Topology) -> tuple[int, int, int, int]:
    return topology.num_replicas, topology.num_groups, topology.num_nodes, topology.num_gpus


FLOAT32_EDITS = (
    ("np.zeros((num_layers, num_packs), dtype=np.float64)", "np.zeros((num_layers, num_packs), dtype=np.float32)"),
    ("weight / logcnt", "weight / logcnt.astype(np.float32)"),
    ("tokens_per_mlog / mlogcnt", "tokens_per_mlog / mlogcnt.astype(np.float32)"),
)
"""What makes vLLM's planner compute in float32, as DeepSeek's published code does, and nothing else."""


def vllm_in_float32(folder: Path = FOLDER) -> Planner | None:
    """vLLM's planner with its arithmetic held in float32: shows whether rounding is all that sets its maps apart.

    None where vLLM's planner is not there, or no longer reads as it did.
    """
    path = folder / VLLM / "default.py"
    if not path.is_file():
        return None
    source = path.read_text()
    for before, after in FLOAT32_EDITS:
        if source.count(before) != 1:
            return None
        source = source.replace(before, after)
    module = ModuleType(f"{_module(folder / VLLM, 'default').__package__}.default_float32")
    exec(compile(source, str(path), "exec"), vars(module))
    return _vllm_planner("vllm-float32", module.DefaultEplbPolicy, "vllm, edited")


def _sglang(name: str, folder: Path, source: str) -> Planner:
    rebalance = _module(folder, "deepseek").rebalance_experts

    def bind(loads: Tensor, topology: Topology) -> Call:
        return lambda: rebalance(loads, *_counts(topology), topology.hierarchical)

    gives = "phy2log, log2phy (as wide as the largest count), logcnt"
    return Planner(name, PUBLISHED, bind, lambda maps: maps[0], "[L, E] float32", gives, source)


def _sglang_vec(name: str, folder: Path, source: str) -> Planner:
    rebalance = _module(folder, "deepseek_vec").rebalance_experts

    def bind(loads: Tensor, topology: Topology) -> Call:
        steps = loads.unsqueeze(0)
        counts = topology.num_replicas, topology.slots_per_gpu, topology.num_groups, topology.num_nodes
        return lambda: rebalance(steps, *counts, topology.hierarchical)

    gives = "phy2log, log2phy, logcnt"
    return Planner(name, name, bind, lambda maps: maps[0].long(), "[1, L, E] float32, one step", gives, source)


def _vllm_ascend(name: str, folder: Path, source: str) -> Planner:
    """Plans globally, from the loads of the slots of a current placement: experts spread in order if nobody says."""
    policy = _module(folder, "policy_default_eplb").DefaultEplb()

    def bind(loads: Tensor, topology: Topology) -> Call:
        layers, experts = loads.shape
        return bind_after(loads, topology, Placement.spread_in_order(layers, experts, topology))

    def bind_after(loads: Tensor, topology: Topology, current: Placement) -> Call:
        if topology.planned_nodes > 1:
            raise ValueError("plans globally only: it cannot keep groups whole on their nodes")
        shape = (len(loads), topology.num_gpus, topology.slots_per_gpu)
        table = current.phy2log.numpy().reshape(shape)
        slots = (loads.double() / current.logcnt).gather(1, current.phy2log).numpy().reshape(shape)
        return lambda: policy.rebalance_experts(table, slots)

    def maps(result: Any) -> Tensor:
        tables = np.asarray(result[2], dtype=np.int64)
        return torch.from_numpy(tables.reshape(len(tables), -1))

    takes = "current table and slot loads [L, D, S], NumPy float64"
    return Planner(
        name, name, bind, maps, takes, "change flag, layer order, table [L, D, S] as lists", source, bind_after
    )


_LOADERS: dict[str, tuple[str, Callable[[str, Path, str], Planner]]] = {
    VLLM: ("vllm", _vllm),
    "sglang": ("sglang", _sglang),
    "sglang-vec": ("sglang", _sglang_vec),
    "vllm-ascend": ("vllm-ascend", _vllm_ascend),
}
