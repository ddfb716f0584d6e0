"""The best that any split can do: a linear program. Needs SciPy, `pip install 'eplb-triton[bound]'`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eplb_triton.serving.checks import check, check_placement, checked_counts
from eplb_triton.topology import Topology


def split_bound(counts: Tensor, phy2log: Tensor, topology: Topology) -> Tensor:
    """The least that the busiest GPU of each layer can have, whatever the shares of the replicas, in fractions.

    Args:
        counts: [L, E], tokens or loads of each expert.
        phy2log: [L, P] int64 or int32, expert in each slot, -1 where there is none.
        topology: P and D.

    Returns:
        [L] float64 on the CPU, the optimum of a linear program to the precision of its solver, about 1e-9.

    Raises:
        ImportError: SciPy cannot be imported.
        ValueError: the shapes do not fit, or a count is none.
        RuntimeError: the solver finds no optimum.
    """
    check_placement(phy2log, topology)
    check("counts", counts, (phy2log.shape[0], counts.shape[-1]), (counts.dtype,), counts.device)
    loads = checked_counts(counts.detach().cpu()).to(torch.float64).numpy()
    maps = phy2log.cpu().numpy()
    found = [_optimum(load, slots, topology.num_gpus) for load, slots in zip(loads, maps, strict=True)]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _optimum(load: NDArray[np.float64], slots: NDArray[np.int64], num_gpus: int) -> float:
    try:
        from scipy.optimize import linprog  # noqa: PLC0415 - an extra
        from scipy.sparse import csr_array  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"split_bound needs SciPy, which cannot be imported ({error}): pip install 'eplb-triton[bound]'"
        ) from error
    gpu = np.arange(slots.size) // (slots.size // num_gpus)
    place = np.unique(np.stack((slots, gpu), 1)[slots >= 0], axis=0)  # by expert, then GPU, each once
    expert, gpu = place[:, 0], place[:, 1]
    alone = np.bincount(expert, minlength=load.size)[expert] == 1
    fixed = np.bincount(gpu[alone], load[expert[alone]], num_gpus)
    expert, gpu = expert[~alone], gpu[~alone]
    if expert.size == 0 or not load.any():
        return float(fixed.max(initial=0.0))
    scale = load.max()  # of the order of 1, as the solver's tolerances are
    kinds, row = np.unique(expert, return_inverse=True)
    column = np.arange(expert.size)
    shares = csr_array((np.ones(expert.size), (row, column)), shape=(kinds.size, expert.size + 1))
    peak = np.full(num_gpus, -1.0)
    loads = csr_array(
        (np.concatenate((np.ones(expert.size), peak)), (np.concatenate((gpu, np.arange(num_gpus))),
         np.concatenate((column, np.full(num_gpus, expert.size))))),
        shape=(num_gpus, expert.size + 1),
    )  # fmt: skip
    cost = np.zeros(expert.size + 1)
    cost[-1] = 1.0
    solved = linprog(cost, loads, -fixed / scale, shares, load[kinds] / scale, method="highs")
    if solved.status != 0:
        raise RuntimeError(f"the solver found no optimum of a layer: {solved.message}")
    return float(solved.fun * scale)
