"""For those who differential-test planners: awkward cases, a comparison of what matters, failing cases as files.

`awkward_cases` needs NumPy and torch alone; `eplb_triton.testing.strategies` has the same for Hypothesis.
`python -m eplb_triton.testing FILE` plans a reproducer with every backend that there is.
"""

from eplb_triton.testing.comparing import canonical, first_difference, same_placement
from eplb_triton.testing.families import FAMILIES, Case, awkward_cases, loads
from eplb_triton.testing.reproducing import Reproducer, read_reproducer, run_reproducer, write_reproducer

__all__ = [
    "FAMILIES",
    "Case",
    "Reproducer",
    "awkward_cases",
    "canonical",
    "first_difference",
    "loads",
    "read_reproducer",
    "run_reproducer",
    "same_placement",
    "write_reproducer",
]
