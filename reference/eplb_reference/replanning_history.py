"""Replanning: from a history to the few sampled steps that a placement is judged on."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.fixed import power_of_two
from eplb_triton.constants import LOAD_BITS, LOAD_UNITS, NEWEST_STEPS

LEAST_STEPS = 8  # fewer are all used: too few to see a change of traffic in


def sample_history(history: Tensor, most_samples: int) -> tuple[Tensor, Tensor]:
    """The loads of a few steps of each layer, spread over the history since its last change of traffic.

    Args:
        history: [n, L, E] float32, loads of n >= 1 steps, oldest first; the newest 4096 count.
        most_samples: at most so many samples a layer.

    Returns:
        samples: [L, E, T] int64, newest first, T the most samples of any layer; 0 where a layer has fewer. The loads of
            a sample add up to about 2**20.
        num_samples: [L] int64.
    """
    of_layers = [_sample(loads, most_samples) for loads in history[-NEWEST_STEPS:].unbind(1)]
    num_samples = torch.tensor([len(samples) for samples in of_layers], dtype=torch.int64, device="cpu")
    samples = torch.nn.utils.rnn.pad_sequence(of_layers, batch_first=True)  # [L, T, E]
    return samples.transpose(1, 2).contiguous(), num_samples


def _sample(loads: Tensor, most_samples: int) -> Tensor:
    """[k, E] int64 of one layer's `loads` [n, E]: k steps evenly spaced back from the newest, their mean corrected to
    that of all steps used."""
    fixed = _steps_since_change(_fixed_point(loads))
    num_steps = len(fixed)
    k = min(most_samples, num_steps)
    taken = fixed[num_steps - 1 - torch.arange(k, dtype=torch.int64, device="cpu") * (num_steps // k)]
    samples = taken * LOAD_UNITS // taken.sum(1, keepdim=True)
    return (samples + (_share(fixed) - samples.sum(0) // k)).clamp(min=0)


def _fixed_point(loads: Tensor) -> Tensor:
    """[n', E] int64: loads as whole numbers on one scale, without the idle steps; one step of ones if all are idle."""
    largest = loads.amax().to(torch.float64)
    scale = LOAD_BITS + 1 - largest.frexp().exponent.to(torch.int64)  # 28 - floor(log2(largest))
    scale.masked_fill_(largest == 0, 0)
    fixed = (loads.to(torch.float64) * power_of_two(scale)).to(torch.int64)
    fixed = fixed[fixed.sum(1) > 0]
    return fixed if len(fixed) else torch.ones(1, loads.shape[1], dtype=torch.int64, device="cpu")


def _steps_since_change(fixed: Tensor) -> Tensor:
    """The newest of the steps [n, E]: those after the last block, a quarter of them long, whose shares differ from
    those of the newest block by more than a quarter (total variation); all of them if no block does."""
    num_steps = len(fixed)
    if num_steps < LEAST_STEPS:
        return fixed
    length = num_steps // 4
    newest = _share(fixed[num_steps - length :])
    for first in range(num_steps - 2 * length, -1, -length):  # what does not fill a block is not looked at
        difference = (_share(fixed[first : first + length]) - newest).abs().sum()
        if difference > LOAD_UNITS // 2:
            return fixed[first + length :]
    return fixed


def _share(fixed: Tensor) -> Tensor:
    """[E] int64: each expert's part of the load of all steps [n, E], in units of 2**-20."""
    return fixed.sum(0) * LOAD_UNITS // fixed.sum()
