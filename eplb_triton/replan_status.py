"""Why a placement in force cannot be planned on: one number a layer, the same on every backend."""

from __future__ import annotations

FINE = 0
OUT_OF_RANGE = 1  # a slot names no expert and is not -1
EMPTY_ON_NODES = 2  # a slot of -1 in hierarchical planning
EXPERTS_MISSING = 3  # more experts without a replica than slots of -1
GROUP_SPLIT = 4  # replicas of a group's experts on two nodes
GROUPS_UNEVEN = 5  # nodes hold different numbers of groups

STATUS_WORDS = {
    FINE: "can be planned on",
    OUT_OF_RANGE: "names an expert outside 0 … num_experts - 1 (-1: a slot without an expert)",
    EMPTY_ON_NODES: "has slots of -1, which only global planning fills",
    EXPERTS_MISSING: "lacks more experts than it has slots of -1",
    GROUP_SPLIT: "has a group on two nodes; hierarchical planning keeps each whole on one",
    GROUPS_UNEVEN: "has more groups on one node than on another",
}
"""What each status says of a layer of the placement. Where several hold, the lowest is reported."""
