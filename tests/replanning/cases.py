"""Histories, placements in force, and the two backends behind one call. No test in here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eplb_triton import POLICIES, Placement, Policy, Topology, plan
from eplb_triton.replans import Replanned
from tests.cases import golden_arrays

STEADY = POLICIES["steady"]
MODULES = {"reference": "eplb_reference", "cpu": "eplb_triton.cpu"}
GLOBAL = Topology(num_replicas=80, num_gpus=16)
GROUPED = Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2)
SHAPES = {
    "global": (64, GLOBAL),
    "grouped": (64, GROUPED),
    "two slots": (24, Topology(num_replicas=32, num_gpus=16)),
    "many slots": (20, Topology(num_replicas=60, num_gpus=4, num_groups=4, num_nodes=2)),
}
"""Experts and topology, by a name for it."""


def replan(
    backend: str,
    history: Tensor,
    topology: Topology,
    previous: Tensor | None,
    *,
    price: float = 3e-4,
    moves: int | None = None,
    policy: Policy = STEADY,
    **options: Any,
) -> Replanned:
    """`replan_layers` of a backend."""
    module = import_module(f"{MODULES[backend]}.replanning")
    made: Replanned = module.replan_layers(history.float(), topology, policy, previous, price, moves, **options)
    return made


def relabel(backend: str, previous: Tensor, planned: Tensor, topology: Topology) -> Tensor:
    """`relabel` of a backend."""
    renamed: Tensor = import_module(f"{MODULES[backend]}.relabelling").relabel(previous, planned, topology)
    return renamed


def traffic(seed: int, num_steps: int, num_layers: int, num_experts: int) -> Tensor:
    """[n, L, E] float32, whole tokens: skewed experts, and topics that make some of them hot in the same steps."""
    random = torch.Generator().manual_seed(seed)
    base = 0.7 * torch.randn(1, num_layers, num_experts, generator=random)
    topics = torch.randn(num_steps, num_layers, 4, generator=random)
    loadings = torch.randn(num_layers, 4, num_experts, generator=random)
    loadings *= torch.rand(num_layers, 4, num_experts, generator=random) < 0.25
    intensity = (base + 0.5 * torch.einsum("nlk,lke->nle", topics, loadings)).softmax(2)
    return torch.poisson(intensity * 64 * num_experts, generator=random)


def in_force(history: Tensor, topology: Topology) -> Tensor:
    """[L, P]: what `balanced` plans from the oldest step."""
    return plan(history[0], topology, policy="balanced", backend="reference").phy2log


def valid(made: Replanned, num_experts: int, topology: Topology) -> None:
    """Refuse what is no placement of that topology."""
    Placement.from_phy2log(made.phy2log, num_experts, topology).validate()


class Golden(NamedTuple):
    """One recorded call."""

    name: str
    history: Tensor  # [n, L, E] float32
    topology: Topology
    price: float
    moves: int | None
    previous: Tensor | None  # [L, P]
    planned: Tensor  # [L, P]


def golden(file: str) -> Iterator[Golden]:
    """The calls of a golden file."""
    arrays = golden_arrays(file)
    for name in dict.fromkeys(key.split("/")[0] for key in arrays):
        replicas, groups, nodes, gpus = arrays[f"{name}/topology"].tolist()
        moves = int(arrays[f"{name}/moves"])
        yield Golden(
            name,
            arrays[f"{name}/history"].float(),
            Topology(num_replicas=replicas, num_groups=groups, num_nodes=nodes, num_gpus=gpus),
            float(arrays[f"{name}/price"]),
            None if moves < 0 else moves,
            arrays.get(f"{name}/phy2log"),
            arrays[f"{name}/planned"],
        )
