"""The places of each expert: its slots, at most one a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_triton.cpu.arith import Ints
from eplb_triton.cpu.compiled import stage

Int32s = NDArray[np.int32]
Slots = NDArray[Any]  # int32 or int64


@stage
def list_places(phy2log: Slots, num_gpus: int, first: Ints, places: Ints) -> None:
    """Fill `first` and `places` of one layer."""
    size, num_experts = phy2log.size // num_gpus, first.size - 1
    last = np.full(num_experts, -1, np.int64)  # the GPU of the expert's last place so far
    first[:] = 0
    for slot in range(phy2log.size):
        expert = phy2log[slot]
        if expert >= 0 and last[expert] != slot // size:
            last[expert] = slot // size
            first[expert + 1] += 1
    for expert in range(num_experts):
        first[expert + 1] += first[expert]
    filled = first[:-1].copy()
    last[:] = -1
    for slot in range(phy2log.size):
        expert = phy2log[slot]
        if expert >= 0 and last[expert] != slot // size:
            last[expert] = slot // size
            places[filled[expert]] = slot
            filled[expert] += 1
