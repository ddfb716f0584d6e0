"""Shapes that planners are tested and timed on: published models on the GPUs that serve them, and small odd ones."""

from __future__ import annotations

from typing import NamedTuple

from eplb_triton.topology import Topology


class Model(NamedTuple):
    """Layers L and experts E of a model, and the GPUs that serve it."""

    layers: int
    experts: int
    topology: Topology


# Topology counts are P, D, G, N. Where G is no multiple of N, planning is global. 1024-to-2048 has 16 layers: the
# slowest published planners take 0.4 to 0.8 s a layer there.
MODELS: dict[str, Model] = {
    name: Model(
        layers,
        experts,
        Topology(num_replicas=counts[0], num_gpus=counts[1], num_groups=counts[2], num_nodes=counts[3]),
    )
    for name, layers, experts, counts in (
        ("v3-hierarchical", 58, 256, (288, 32, 8, 4)),  # DeepSeek-V3: 256 experts in 8 groups, 32 redundant
        ("v3-global", 58, 256, (288, 32, 1, 1)),
        ("v3-144-gpus", 58, 256, (288, 144, 8, 18)),
        ("kimi-k2", 60, 384, (448, 64, 1, 8)),
        ("qwen3", 94, 128, (160, 32, 1, 4)),
        ("kimi-k3-like", 60, 896, (1024, 128, 1, 16)),
        ("512-to-1024", 94, 512, (1024, 128, 1, 1)),
        ("1024-to-2048", 16, 1024, (2048, 1024, 1, 1)),
    )
}
ODD: dict[str, Model] = {
    "hierarchical": Model(3, 24, Topology(num_replicas=36, num_gpus=12, num_groups=6, num_nodes=3)),
    "global": Model(3, 37, Topology(num_replicas=52, num_gpus=13)),
    "in rounds": Model(3, 40, Topology(num_replicas=96, num_gpus=48)),
    "one replica a GPU": Model(3, 12, Topology(num_replicas=20, num_gpus=20, num_groups=4, num_nodes=2)),
}
"""Small ones: GPUs that are no power of two, packing in rounds, a single slot."""
