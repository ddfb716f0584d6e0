"""Loads, topologies and golden plans that the tests share. No test in here, and no planner."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eplb_triton import POLICIES, Topology
from eplb_triton.testing import FAMILIES, loads
from eplb_triton.testing.strategies import Shape, shapes

__all__ = [
    "FAMILIES",
    "MEAN_OVER_ROWS",
    "GoldenCase",
    "Shape",
    "golden_arrays",
    "golden_cases",
    "loads",
    "shapes",
    "stage_arrays",
    "stage_groups",
    "unordered",
]

GOLDEN = Path(__file__).parent / "golden"
MEAN_OVER_ROWS = {name for name, policy in POLICIES.items() if policy.counts in ("dispersion", "simulated")}
"""Policies in which a layer's plan depends on the other layers of the call."""
PUBLISHED = [name for name, policy in POLICIES.items() if policy.gpu_pack != "blocks"]
"""Policies of other programs, whose plans are recorded in `golden`."""


class GoldenCase(NamedTuple):
    """One recorded call: weight [layers, E], and per policy (phy2log [layers, P], logcnt [layers, E])."""

    name: str
    weight: Tensor
    topology: Topology
    plans: dict[str, tuple[Tensor, Tensor]]


@cache
def golden_arrays(file: str) -> dict[str, Tensor]:
    """Arrays of a golden file; integers widened to int64."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    return {key: value if value.is_floating_point() else value.to(torch.int64) for key, value in tensors.items()}


def golden_cases(file: str) -> Iterator[GoldenCase]:
    """The calls of `placements` or `exact`; a stack of independent calls is one case each."""
    arrays = golden_arrays(file)
    for name in dict.fromkeys(key.split("/")[0] for key in arrays):
        _, replicas, groups, nodes, gpus = arrays[f"{name}/topology"].tolist()
        topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
        stacked = {
            key.removeprefix(f"{name}/"): value if name.startswith("stack") else value.unsqueeze(0)
            for key, value in arrays.items()
            if key.startswith(f"{name}/") and not key.endswith("topology")
        }
        for call, weight in enumerate(stacked["weight"]):
            plans = {
                policy: (stacked[f"{policy}/phy2log"][call], stacked[f"{policy}/logcnt"][call])
                for policy in POLICIES
                if f"{policy}/phy2log" in stacked
            }
            yield GoldenCase(f"{name}.{call}", weight, topology, plans)


def stage_groups(stage: str) -> list[str]:
    """Keys of `stages` up to the array name: `refine/4 corner 2`, …"""
    keys = golden_arrays("stages")
    return list(dict.fromkeys(key.rsplit("/", 1)[0] for key in keys if key.startswith(f"{stage}/")))


def stage_arrays(group: str) -> dict[str, Tensor]:
    """Fresh copies of the arrays of one group of `stages`, by their last name."""
    found = {key: value for key, value in golden_arrays("stages").items() if key.rsplit("/", 1)[0] == group}
    return {key.rsplit("/", 1)[1]: value.clone() for key, value in found.items()}


def unordered(phy2log: Tensor, topology: Topology) -> list[list[list[list[int]]]]:
    """Per layer and node, the sorted GPUs, each its sorted experts: equal for plans that differ in the numbering of
    slots inside a GPU and of GPUs inside a node only."""
    nodes = topology.planned_nodes
    gpus = phy2log.view(-1, nodes, topology.gpus_per_node, topology.slots_per_gpu).sort(-1).values.tolist()
    return [[sorted(node) for node in layer] for layer in gpus]
