"""Arithmetic whose order and ties the result depends on: ordered sums, and the two largest and smallest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eplb_triton.constants import EPSILON

EPSILON_F32 = torch.tensor(EPSILON, dtype=torch.float32, device="cpu")  # in float32 comparisons


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in float64, left to right from 0.

    `torch.sum` adds in an order of its own that differs between devices; `cumsum` is sequential on the CPU.
    """
    return values.to(torch.float64).cumsum(-1)[..., -1]


def ordered_mean(values: Tensor) -> Tensor:
    """`ordered_sum` divided by the number of values, in float64."""
    return ordered_sum(values) / values.shape[-1]


def square_root(values: Tensor) -> Tensor:
    """Of float64 `values`, correctly rounded. PyTorch's may come from a vector library that is 1 bit off in 1 of 75."""
    return torch.from_numpy(np.sqrt(values.numpy()))


def top_two(values: Tensor) -> Tensor:
    """Indices [rows, 2] of the largest and second largest of `values` [rows, n >= 2]; ties: lowest index."""
    first = values.argmax(1, keepdim=True)
    return torch.cat((first, values.scatter(1, first, -torch.inf).argmax(1, keepdim=True)), 1)


def bottom_two(values: Tensor) -> Tensor:
    """Indices [rows, 2] of the smallest and second smallest of `values` [rows, n >= 2]; ties: lowest index."""
    first = values.argmin(1, keepdim=True)
    return torch.cat((first, values.scatter(1, first, torch.inf).argmin(1, keepdim=True)), 1)


def per_replica(loads: Tensor, counts: Tensor) -> Tensor:
    """Load that each of `counts` replicas of an expert carries, w/c in float32."""
    return loads / counts.to(torch.float32)


def indices(stop: int, start: int = 0) -> Tensor:
    """start .. stop - 1, int64: on the CPU, whatever device is PyTorch's default."""
    return torch.arange(start, stop, dtype=torch.int64, device="cpu")


def columns(values: Tensor) -> tuple[Tensor, ...]:
    """The columns of `values` [rows, n], each [rows, 1]."""
    return tuple(values[:, k : k + 1] for k in range(values.shape[1]))
