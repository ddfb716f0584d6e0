"""What a GPU run plans: models and small odd shapes. A shape costs seconds to compile, for each policy."""

from __future__ import annotations

from bench.cases import CASES, Case
from eplb_triton import Topology

MODELS: dict[str, Case] = {
    case.name: case
    for case in CASES
    if case.name in ("v3-hierarchical", "v3-global", "kimi-k2", "qwen3", "512-to-1024", "1024-to-2048")
}
V3 = MODELS["v3-hierarchical"]
SMALL = {
    "hierarchical": (24, Topology(num_replicas=36, num_gpus=12, num_groups=6, num_nodes=3)),
    "global": (37, Topology(num_replicas=52, num_gpus=13)),
    "in rounds": (40, Topology(num_replicas=96, num_gpus=48)),
    "one replica a GPU": (12, Topology(num_replicas=20, num_gpus=20, num_groups=4, num_nodes=2)),
}
"""(E, topology) of the random cases; planned with log2phy, the models but for V3 without."""
