"""The compiled CPU backend, in Numba: one row at a time, layers spread over threads.

Raises:
    ImportError: Numba cannot be imported.
"""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"backend='cpu' needs Numba, which cannot be imported ({error}): pip install 'eplb-triton[cpu]'"
    ) from error

from eplb_triton.cpu.launcher import CpuPlan, plan_layers, warm_up

__all__ = ["CpuPlan", "plan_layers", "warm_up"]
