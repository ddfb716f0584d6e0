"""The table of cases, their loads, and what is judged on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.cases import CASES, WINDOWS, Case, MissingTraceError, digest, select, series
from bench.quality import CAUSES, causes, quality, same_layers
from bench.studies.conformance import random_cases
from eplb_triton import Placement, Topology, plan
from eplb_triton.testing import canonical

DRAWN = [case for case in CASES if case.family != "recorded" and case.layers * case.experts < 30_000]


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_loads_are_seeded_and_as_the_family_says(case: Case) -> None:
    loads = series(case)
    assert loads.shape == (WINDOWS, case.layers, case.experts)
    assert loads.dtype == torch.float32
    assert digest(loads) == digest(series(case))
    assert bool((loads >= 0).all())
    ascending = loads.sort(dim=2).values
    ties = bool((ascending[..., 1:] == ascending[..., :-1]).any())
    assert ties == (not case.tie_free)
    assert bool((loads[0] != loads[1]).any())


def test_a_recorded_case_needs_its_recording(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.name == "trace-law"]
    with pytest.raises(MissingTraceError, match="EPLB_TRACES"):
        series(case)
    with pytest.raises(MissingTraceError, match=r"no law\.npz"):
        series(case, tmp_path)


def test_a_case_is_refused_if_it_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="num_replicas=8"):
        Case("small", 1, 12, Topology(num_replicas=8, num_gpus=8), "drift")
    with pytest.raises(ValueError, match="recording"):
        Case("no trace", 1, 8, Topology(num_replicas=8, num_gpus=8), "recorded")


def test_select_takes_globs_in_the_order_of_the_table() -> None:
    names = ["v3-a", "kimi", "v3-b"]
    assert select("", names, "case") == names
    assert select("v3-*", names, "case") == ["v3-a", "v3-b"]
    assert select("v3-b, kimi", names, "case") == ["kimi", "v3-b"]
    with pytest.raises(ValueError, match="matches none"):
        select("qwen", names, "case")


def test_canonical_forgets_gpu_numbers_and_slots_but_not_nodes() -> None:
    topology = Topology(num_replicas=8, num_gpus=4, num_groups=2, num_nodes=2)
    one = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    same = torch.tensor([[3, 2, 1, 0, 4, 5, 7, 6]])  # GPUs of node 0 change places, slots turn round
    other_node = torch.tensor([[4, 5, 6, 7, 0, 1, 2, 3]])
    assert torch.equal(canonical(one, topology), canonical(same, topology))
    assert not torch.equal(canonical(one, topology), canonical(other_node, topology))


def test_same_layers_tells_counts_from_maps() -> None:
    topology = Topology(num_replicas=4, num_gpus=2)
    left = Placement.from_phy2log(torch.tensor([[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0]]), 3, topology)
    right = Placement.from_phy2log(torch.tensor([[2, 0, 1, 0], [0, 0, 1, 2], [0, 1, 2, 1]]), 3, topology)
    counts, maps = same_layers(left, right)
    assert counts.tolist() == [True, True, False]
    assert maps.tolist() == [True, False, False]


def test_quality_of_a_plan_that_does_not_change() -> None:
    topology = Topology(num_replicas=4, num_gpus=2)
    loads = torch.tensor([[[4.0, 1.0, 1.0]], [[1.0, 4.0, 1.0]], [[1.0, 1.0, 4.0]]])
    placement = Placement.from_phy2log(torch.tensor([[0, 1, 0, 2]]), 3, topology)
    found = quality([placement, placement], loads)
    assert found["balancedness"] == [1.0, pytest.approx(3 / 4.5)]
    assert found["gap"] == [0.0, pytest.approx(0.5)]
    assert found["next_balancedness"] == [pytest.approx(3 / 4.5)] * 2
    assert (found["moved_slots"], found["fetched"], found["duplicates"]) == ([0.0], [0.0], [0.0, 0.0])


def test_every_cause_of_a_difference_is_found() -> None:
    loads = torch.tensor([[1.0, 1.0, 5.0, 9.0], [2.0, 1.0, 5.0, 9.0], [2.0, 4.0, 5.0, 1.0], [2.0, 4.0, 5.0, 9.0]])
    counts = torch.tensor([[1, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert causes(loads, counts, Topology(num_replicas=8, num_gpus=4, num_groups=2, num_nodes=2)) == list(CAUSES)
    assert causes(loads[:0], counts[:0], Topology(num_replicas=8, num_gpus=4, num_groups=2, num_nodes=2)) == []


def test_random_cases_can_be_planned_and_are_seeded() -> None:
    once, again = list(random_cases(24, 3)), list(random_cases(24, 3))
    assert [(one.kind, one.topology) for one in once] == [(one.kind, one.topology) for one in again]
    assert {one.topology.planned_nodes > 1 for one in once} == {True, False}
    for one, same in zip(once, again, strict=True):
        assert torch.equal(one.loads, same.loads)
        plan(one.loads, one.topology, backend="reference").validate()
