"""What a serving engine asks besides a plan: the loads it sees, which replica each token goes to, whether ranks agree,
and how weights get to where a new plan has them."""

from eplb_triton.serving.agreement import Verdict, agree, own_group
from eplb_triton.serving.moving import MoveError, WeightsMoved, move_weights
from eplb_triton.serving.transfers import Transfers, list_transfers
from eplb_triton.serving.window import LoadWindow

__all__ = [
    "LoadWindow",
    "MoveError",
    "Transfers",
    "Verdict",
    "WeightsMoved",
    "agree",
    "list_transfers",
    "move_weights",
    "own_group",
]
