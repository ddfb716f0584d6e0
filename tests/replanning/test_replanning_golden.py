"""Replanning, slot by slot, against plans recorded from independent readings of the specification."""

from __future__ import annotations

import pytest
import torch

from tests.backends import CPU_BACKENDS
from tests.replanning.cases import golden, replan
from tests.sizes import full_unless

PARTS = 8
"""Of the recorded calls, every eighth makes a part; the reference takes one part in `make test`."""


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=full_unless(part == 0), id=f"part {part}") for part in range(PARTS)]
)
def test_recorded_plans(part: int, backend: str) -> None:
    cases = list(golden("replan"))
    assert len(cases) == 323
    for case in cases[part::PARTS]:
        made = replan(backend, case.history, case.topology, case.previous, price=case.price, moves=case.moves)
        assert torch.equal(made.phy2log, case.planned), case.name
        assert not made.status.any(), case.name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_recorded_edges(backend: str) -> None:
    """Each tells one plausible misreading from the text."""
    layers = 0
    for case in golden("replan_edges"):
        made = replan(backend, case.history, case.topology, case.previous, price=case.price, moves=case.moves)
        assert torch.equal(made.phy2log, case.planned), case.name
        layers += len(made.phy2log)
    assert layers == 20


def test_the_recorded_plans_are_all_there() -> None:
    assert sum(len(case.planned) for file in ("replan", "replan_edges") for case in golden(file)) == 6359


@pytest.mark.parametrize("part", [pytest.param(part, marks=full_unless(part == 0)) for part in range(PARTS)])
def test_recorded_plans_report_alike(part: int) -> None:
    """What is reported beside the maps: the same bits from both backends, and no slot more than was asked for."""
    for case in list(golden("replan"))[part::PARTS]:
        ours, theirs = (
            replan(backend, case.history, case.topology, case.previous, price=case.price, moves=case.moves)
            for backend in CPU_BACKENDS
        )
        for name, mine, its in zip(ours._fields, ours, theirs, strict=True):
            assert mine.dtype == its.dtype
            assert torch.equal(mine.nan_to_num(-1.0), its.nan_to_num(-1.0)), (case.name, name)
        if case.previous is not None:
            fills = case.previous < 0
            assert torch.equal(ours.fills, fills.sum(1)), case.name
            assert (ours.written >= ((ours.phy2log != case.previous) & ~fills).sum(1)).all(), case.name
            assert case.moves is None or int(ours.written.max()) <= case.moves, case.name
