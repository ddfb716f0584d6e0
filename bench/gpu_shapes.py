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
    "hierarchical": (24, Topology(36, 6, 3, 12)),
    "global": (37, Topology(52, 1, 1, 13)),
    "in rounds": (40, Topology(96, 1, 1, 48)),
    "one replica a GPU": (12, Topology(20, 4, 2, 20)),
}
"""(E, topology) of the random cases; planned with log2phy, the models but for V3 without."""
