"""The planner in plain PyTorch: the oracle every other backend must equal bit for bit, and the CPU fallback.

One file per stage, `pipeline` calls them in order. All rows of a call are planned at once; a row is a layer, or one
node of a layer in hierarchical planning. e, p, d: experts, replicas and GPUs of a row.
"""

from eplb_reference.pipeline import plan_layers

__all__ = ["plan_layers"]
