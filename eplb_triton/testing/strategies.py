"""Hypothesis strategies: shapes that fit, and loads that are awkward. Needs hypothesis: `pip install hypothesis`."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from eplb_triton.testing.families import FAMILIES, Case, loads
from eplb_triton.topology import Topology


class Shape(NamedTuple):
    """A number of experts and a topology that fits it."""

    experts: int
    topology: Topology


@st.composite
def shapes(draw: st.DrawFn, max_experts: int = 64) -> Shape:
    """Hierarchical and global shapes: one GPU, one expert, capacity 1, no redundancy and odd sizes included."""
    nodes = draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, max(1, max_experts // groups)))
    gpus = nodes * draw(st.integers(1, 6))
    slots = -(-experts // gpus) + draw(st.integers(0, 4))
    replicas = gpus * slots
    if draw(st.booleans()):  # global planning: groups that no node count divides are ignored
        groups, nodes = (nodes + 1, nodes) if nodes > 1 else (1, 1)
        experts = draw(st.integers(1, experts))
    return Shape(experts, Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes))


@st.composite
def cases(draw: st.DrawFn, max_experts: int = 64, max_layers: int = 4) -> Case:
    """Loads of a family on a shape that fits."""
    shape = draw(shapes(max_experts))
    family, seed = draw(st.sampled_from(sorted(FAMILIES))), draw(st.integers(0, 2**32 - 1))
    layers = draw(st.integers(1, max_layers))
    return Case(f"{family} {seed}", loads(family, seed, layers, shape.experts), shape.topology)
