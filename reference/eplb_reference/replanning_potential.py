"""Replanning: what a placement is worth on the samples, as one number that moves can be compared by.

All integers are exact; every operation on float64 is rounded on its own. A layer's samples beyond its own are zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eplb_reference.arith import square_root
from eplb_triton.constants import LOAD_UNITS, MOST_FLOOR, POWER_BITS, POWER_LIMIT
from eplb_triton.topology import Topology


class Judge(NamedTuple):
    """What a placement is judged by, of each layer."""

    samples: Tensor  # [L, E, T] int64
    num_samples: Tensor  # [L] int64
    z: float  # standard deviations that count
    norm: int  # power mean over GPUs, a power of 2

    def of(self, layers: Tensor) -> Judge:
        """The same of some layers: indices, or a mask."""
        return self._replace(samples=self.samples[layers], num_samples=self.num_samples[layers])


class Replicas(NamedTuple):
    """What one replica of each expert brings to its GPU."""

    loads: Tensor  # [L, E, T] int64, in each sample
    spread: Tensor  # [L, E] int64, T**2 times the variance of that


class Gpus(NamedTuple):
    """What each GPU carries."""

    loads: Tensor  # [L, D, T] int64, in each sample
    mean: Tensor  # [L, D] int64, sum of that: T times the mean
    square: Tensor  # [L, D] int64, sum of its squares
    spread: Tensor  # [L, D] int64, sum of the spreads of its replicas


class Potential(NamedTuple):
    """The state that the gain of a move is measured against."""

    score: Tensor  # [L, D] int64
    top: Tensor  # [L] int64, largest score
    power: Tensor  # [L, D] int64, of each GPU
    sum: Tensor  # [L] int64, F: powers of all GPUs
    peak: Tensor  # [L] float64, J: the power mean on the scale of the scores


class State(NamedTuple):
    """Everything about the layers that are still searched."""

    phy2log: Tensor  # [L, P] int64
    counts: Tensor  # [L, E] int64
    replicas: Replicas
    gpus: Gpus
    potential: Potential


def replicas_of(samples: Tensor, counts: Tensor, num_samples: Tensor) -> Replicas:
    """Loads and spread of one of `counts` replicas each of `samples` [..., T]; `num_samples` broadcasts to counts."""
    loads = samples // counts.unsqueeze(-1)
    return Replicas(loads, num_samples * loads.square().sum(-1) - loads.sum(-1).square())


def gpus_of(phy2log: Tensor, replicas: Replicas, num_gpus: int) -> Gpus:
    """What the GPUs of a placement [L, P] carry."""
    num_layers, _, num_samples = replicas.loads.shape
    slots = phy2log.unsqueeze(2).expand(-1, -1, num_samples)
    loads = replicas.loads.gather(1, slots).view(num_layers, num_gpus, -1, num_samples).sum(2)
    spread = replicas.spread.gather(1, phy2log).view(num_layers, num_gpus, -1).sum(2)
    return Gpus(loads, loads.sum(2), loads.square().sum(2), spread)


def scores(mean: Tensor, square: Tensor, spread: Tensor, num_samples: Tensor, z: float) -> Tensor:
    """T times (mean + z standard deviations) of a GPU's load, cut: half of the covariance between experts counts."""
    twice = (num_samples * square - mean.square() + spread).clamp(min=0)
    return mean + (square_root((twice >> 1).to(torch.float64)) * z).to(torch.int64)


def powers(score: Tensor, top: Tensor, norm: int) -> Tensor:
    """(score / top) ** norm in units of 2**-30; 2**46 for a score above `top`."""
    ratio = (score << POWER_BITS) // top.clamp(min=1)
    power = ratio.clamp(max=1 << POWER_BITS)
    for _ in range(norm.bit_length() - 1):
        power = power.square() >> POWER_BITS
    return power.masked_fill(ratio > 1 << POWER_BITS, POWER_LIMIT)


def potential_of(gpus: Gpus, judge: Judge) -> Potential:
    """The potential of what GPUs carry."""
    score = scores(gpus.mean, gpus.square, gpus.spread, judge.num_samples.unsqueeze(1), judge.z)
    top = score.amax(1)
    power = powers(score, top.unsqueeze(1), judge.norm)
    total = power.sum(1)
    root = total.to(torch.float64) / float(score.shape[1] << POWER_BITS)
    for _ in range(judge.norm.bit_length() - 1):
        root = square_root(root)
    return Potential(score, top, power, total, top.to(torch.float64) * root)


def state_of(phy2log: Tensor, judge: Judge, topology: Topology) -> State:
    """Everything that follows from a placement [L, P]."""
    counts = torch.zeros(judge.samples.shape[:2], dtype=torch.int64, device="cpu")
    counts.scatter_add_(1, phy2log, torch.ones_like(phy2log))
    replicas = replicas_of(judge.samples, counts, judge.num_samples.unsqueeze(1))
    gpus = gpus_of(phy2log, replicas, topology.num_gpus)
    return State(phy2log, counts, replicas, gpus, potential_of(gpus, judge))


def price_of_slot(price: float, num_samples: Tensor, num_gpus: int) -> Tensor:
    """[L] float64: `price`, a part of the mean GPU load, on the scale of the scores."""
    return price * ((num_samples * LOAD_UNITS).to(torch.float64) / num_gpus)


def least_gain(price: Tensor, potential: Potential, norm: int) -> Tensor:
    """[L] int64: how far F must fall a written slot so that J falls by more than `price` [L]."""
    gain = price * norm * potential.sum.to(torch.float64) / potential.peak
    return gain.clamp(1, MOST_FLOOR).to(torch.int64)


def predicted_peak(peak: Tensor, num_samples: Tensor, num_gpus: int) -> Tensor:
    """[L] float64: J as a multiple of the mean GPU load."""
    return peak * num_gpus / (num_samples * LOAD_UNITS).to(torch.float64)
