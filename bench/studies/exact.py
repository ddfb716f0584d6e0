"""The optimum of tiny instances by mixed-integer programming, to judge plans and bounds by. Needs SciPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from eplb_triton import Topology


def optimum(loads: NDArray[np.float64], topology: Topology, seconds: float = 20.0) -> float | None:
    """The smallest possible load of a layer's heaviest GPU over all counts and placements; None: not proven in time.

    Variables: chosen(i, c), whether expert i has c replicas; held(i, c, g), how many of them GPU g holds;
    home(group, node); the peak. `loads` is [E], up to about 12 experts and 8 GPUs.
    """
    num_experts, gpus, nodes = len(loads), topology.num_gpus, topology.planned_nodes
    groups, slots, most = topology.planned_groups, topology.slots_per_gpu, topology.num_replicas - len(loads) + 1
    chosen = np.arange(num_experts * most).reshape(num_experts, most)
    held = chosen.size + np.arange(chosen.size * gpus).reshape(num_experts, most, gpus)
    home = chosen.size + held.size + np.arange(groups * nodes).reshape(groups, nodes)
    peak = chosen.size + held.size + home.size

    rows: list[tuple[list[int], list[float], float, float]] = []  # variables, factors, least, most

    def require(variables: object, factors: object, least: float, greatest: float) -> None:
        where = np.ravel(np.asarray(variables))
        rows.append(
            (where.tolist(), np.broadcast_to(np.asarray(factors, float), where.shape).tolist(), least, greatest)
        )

    for expert in range(num_experts):
        require(chosen[expert], 1, 1, 1)
        for count in range(1, most + 1):
            variables = [*held[expert, count - 1], chosen[expert, count - 1]]
            require(variables, [1.0] * gpus + [-count], 0, 0)
        for gpu in range(gpus):
            node = home[expert // (num_experts // groups), gpu // topology.gpus_per_node]
            require([*held[expert, :, gpu], node], [1.0] * most + [-slots], -np.inf, 0)
    share = loads[:, None] / np.arange(1, most + 1)
    for gpu in range(gpus):
        require(held[:, :, gpu], 1, slots, slots)
        require([*held[:, :, gpu].ravel(), peak], [*share.ravel(), -1.0], -np.inf, 0)
    for group in range(groups):
        require(home[group], 1, 1, 1)
    for node in range(nodes):
        require(home[:, node], 1, groups // nodes, groups // nodes)

    matrix = lil_array((len(rows), peak + 1))
    for row, (variables, factors, _, _) in enumerate(rows):
        matrix[row, variables] = factors
    whole = np.ones(peak + 1)
    whole[peak] = 0
    upper = np.ones(peak + 1)
    upper[held.ravel()], upper[peak] = slots, np.inf
    cost = np.zeros(peak + 1)
    cost[peak] = 1
    limits = LinearConstraint(matrix.tocsr(), [row[2] for row in rows], [row[3] for row in rows])
    options = {"time_limit": seconds, "mip_rel_gap": 1e-9}
    solved = milp(cost, integrality=whole, bounds=Bounds(0, upper), constraints=limits, options=options)
    return float(solved.fun) if solved.status == 0 else None
