"""The load below which no placement can bring the heaviest GPU of a layer. `pairing` needs SciPy, and is read late."""

from eplb_triton.bound.lower import lower_bound

__all__ = ["lower_bound"]
