"""Fixed point: loads as whole numbers on a scale of their row, so that sums are exact in any order.

Here they are float64 that hold integers below 2^30, since Numba would widen every int32 sum to an int64 and so lose
half of the vector; the reference has the same numbers as int32.
"""

from __future__ import annotations

import math

import numpy as np

from eplb_triton import constants
from eplb_triton.cpu.arith import Doubles, Floats
from eplb_triton.cpu.compiled import stage

LOAD_BITS = np.int64(constants.LOAD_BITS)
PENALTY = float(constants.PENALTY)


@stage
def fixed_point(loads: Floats, capacity: int, fixed: Doubles) -> int:
    """Fill `fixed` with trunc(load * 2^scale), `capacity` of which add up to less than 2^28; the scale, 0 for an
    idle row."""
    largest = np.float64(0)
    for i in range(loads.size):
        largest = max(largest, np.float64(loads[i]))
    if largest == 0:
        fixed[:] = 0
        return 0
    bits = 0
    while capacity > 1 << bits:
        bits += 1
    scale: int = LOAD_BITS - bits - np.int64(math.frexp(largest)[1])
    factor = math.ldexp(1.0, scale)
    for i in range(loads.size):
        fixed[i] = np.trunc(np.float64(loads[i]) * factor)
    return scale


@stage
def mean_target(fixed: Doubles, num_packs: int) -> float:
    """The mean pack load, rounded up. No pack need be lighter."""
    total = 0.0
    for i in range(fixed.size):
        total += fixed[i]
    target: float = np.float64((np.int64(total) + num_packs - 1) // num_packs)
    return target


@stage
def node_target(node_loads: Doubles, node_scale: int, fixed: Doubles, scale: int, num_packs: int) -> float:
    """The mean GPU load of the layer's heaviest node on the scale of a row, or the row's own if larger."""
    heaviest = 0.0
    for node in range(node_loads.size):
        heaviest = max(heaviest, node_loads[node])
    of_layer: float = np.trunc(min(heaviest * math.ldexp(1.0, scale - node_scale) / num_packs, PENALTY))
    return max(of_layer, mean_target(fixed, num_packs))
