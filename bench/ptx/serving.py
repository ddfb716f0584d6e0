"""The kernels of a serving step, compiled: which tensors each is given, of which types."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.ptx.compiled import TARGETS, Compiled, compile_kernel
from eplb_triton.kernels.serve_launch import HASHED_IDS, IDS, spec, split_shape

INT64, INT32 = torch.int64, torch.int32
TYPES: dict[str, dict[str, torch.dtype | None]] = {
    "classify_layers": {"phy2log_ptr": INT64, "scratch_ptr": INT32, "classes_ptr": INT32},
    "split_layers": {
        "phy2log_ptr": INT64,
        "classes_ptr": INT32,
        "counts_ptr": INT32,
        "offsets_ptr": INT32,
        "scratch_ptr": INT32,
        "quotas_ptr": INT32,
    },
    "count_chunks": {"topk_ids_ptr": INT32, "counts_ptr": INT32},
    "route_exactly": {
        "topk_ids_ptr": INT32,
        "phy2log_ptr": INT64,
        "quotas_ptr": INT32,
        "offsets_ptr": INT32,
        "counts_ptr": INT32,
        "slots_ptr": INT32,
    },
    "route_by_hash": {
        "topk_ids_ptr": INT32,
        "phy2log_ptr": INT64,
        "quotas_ptr": INT32,
        "salt_ptr": None,
        "slots_ptr": INT32,
    },
    "fill_tables": {"phy2log_ptr": INT64, "quotas_ptr": INT32, "table_ptr": INT64},
    "add_ids": {"topk_ids_ptr": INT32, "ring_ptr": INT32, "position_ptr": INT64, "bad_ptr": INT32},
    "add_slots": {
        "tokens_ptr": INT32,
        "phy2log_ptr": INT64,
        "ring_ptr": INT32,
        "position_ptr": INT64,
        "bad_ptr": INT32,
    },
    "transfer_layers": {
        "ahead_ptr": INT64,
        "live_ptr": INT64,
        "source_ptr": INT32,
        "batch_ptr": INT32,
        "counts_ptr": INT32,
    },
}
_CONSTANTS = {
    "count_chunks": {"IDS": IDS},
    "route_exactly": {"IDS": IDS},
    "route_by_hash": {"IDS": HASHED_IDS, "K": 8},
    "add_ids": {"IDS": HASHED_IDS},
    "transfer_layers": {"GPUS_PER_NODE": 8},
}
"""Of each kernel, but for what depends on the call."""


def compile_serving(
    name: str,
    target: str,
    types: Mapping[str, torch.dtype | None],
    *,
    num_experts: int,
    num_replicas: int,
    num_gpus: int,
    top_k: int = 8,
) -> Compiled:
    """A kernel of `TYPES` for one placement; `types`: dtype of each of its tensors, None for one that is absent."""
    lanes = TARGETS[target].warp_size
    shape = split_shape(num_experts, num_replicas, num_gpus, lanes)
    constants = dict(_CONSTANTS.get(name, {}))
    if "K" in constants:
        constants["K"] = top_k
    return compile_kernel(spec(name, shape, tuple(types.items()), lanes=lanes, **constants), target)
