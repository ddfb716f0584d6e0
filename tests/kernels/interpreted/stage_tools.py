"""What tests of single stages share: the families of loads, sizes of counts, scratch that nobody has written yet."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_triton.kernels.shapes import Replicating
from tests.cases import FAMILIES
from tests.sizes import chosen

CHOSEN = chosen(FAMILIES, "continuous", "ties")


def replicating(num: int, num_replicas: int, at_once: bool = False) -> Replicating:
    return Replicating(num, num_replicas, 1, 32, 64, 64, at_once)


def scratch(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), torch.nan if dtype.is_floating_point else -7, dtype=dtype)
