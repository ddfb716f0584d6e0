"""Names of compiled stages: code from Numba's cache and code compiled now lie side by side in a process."""

from __future__ import annotations

from collections import defaultdict

import pytest

from eplb_triton import POLICIES
from eplb_triton.cpu import rows
from eplb_triton.cpu.fields import fields_of


@pytest.mark.parametrize("factory", ["group_stage", "count_stage", "pack_stage", "refine_stage"])
def test_stages_of_one_name_are_the_same(factory: str) -> None:
    """LLVM takes the first of two functions of one name for both, whatever they close over."""
    closed_over = defaultdict(set)
    for policy in POLICIES.values():
        function = getattr(rows, factory)(fields_of(policy)).py_func
        cells = tuple(str(cell.cell_contents) for cell in function.__closure__ or ())
        closed_over[function.__qualname__].add(cells)
    assert len(closed_over) > 1
    assert all(len(variants) == 1 for variants in closed_over.values())
