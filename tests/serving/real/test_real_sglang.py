"""Inside SGLang: its own EPLBManager, metadata and updater on three ranks of a CPU. Needs the folder of an unpacked
wheel: docs/frameworks.md.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.serving.real.ranks import answers_of_program
from tests.serving.real.stub_model import EXPERTS, in_order

FOLDER = os.environ.get("EPLB_SGLANG", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="EPLB_SGLANG names no folder with sglang/ in it")

PLANNED = ("plans", "a node a rank", "deepseek", "elasticity_aware", "stop file", "after the stop file")
KEPT = ("shadow", "another plan on rank 1")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The map of static dispatch, and what each rank found."""
    stop = str(tmp_path_factory.mktemp("real") / "stop")
    return answers_of_program("sglang_ranks", FOLDER, EPLB_TRITON_BACKEND="reference", EPLB_REAL_STOP=stop)


def live(ranks: list[Any], name: str) -> Any:
    """The map in force, after checking that all ranks have the same."""
    maps = [rank[name]["models"][0]["map"] for rank in ranks]
    assert maps[0] == maps[1] == maps[2]
    return maps[0]


def test_both_functions_are_hooked(ranks: list[Any]) -> None:
    for rank in ranks:
        names = [name.rpartition(".")[2] for name in rank["hooks"]]
        assert names == ["rebalance_experts", "compute_logical_to_rank_dispatch_physical_map"]


@pytest.mark.parametrize("name", [*PLANNED, *KEPT])
def test_weights_are_where_the_map_says_and_tokens_find_them(ranks: list[Any], name: str) -> None:
    assert all(set(row) == set(range(EXPERTS)) for row in live(ranks, name))
    for rank in ranks:
        (found,) = rank[name]["models"]
        assert found["wrong"] == []
        assert found["cpu"]
        assert found["maps fit"]
        assert found["dispatch"]
        assert found["near"]


@pytest.mark.parametrize("name", PLANNED)
def test_maps_change(ranks: list[Any], name: str) -> None:
    assert live(ranks, name) != in_order().tolist()


@pytest.mark.parametrize("name", ["plans", "a node a rank", "deepseek", "after the stop file"])
def test_ours_are_the_plans_and_rank_0_says_so(ranks: list[Any], name: str) -> None:
    first, *others = (rank[name]["lines"] for rank in ranks)
    assert first
    assert all("policy=steady" in line for line in first)
    assert others == [[], []]


def test_the_ring_of_recorded_steps_is_planned_for_in_order_of_time(ranks: list[Any]) -> None:
    """Layers move in two chunks, a pass apart, so that each window begins one row further in the ring."""
    for rank in ranks:
        assert len(rank["passes"]) == 4
        assert all(passes == list(range(passes[0], passes[0] + 4)) for passes in rank["passes"])


def test_ranks_that_differ_keep_the_map_and_each_says_so(ranks: list[Any]) -> None:
    assert live(ranks, "another plan on rank 1") == in_order().tolist()
    for number, rank in enumerate(ranks):
        said = rank["another plan on rank 1"]["lines"]
        assert said == [f"rank {number}: ranks differ in plan; the placement in force is kept"]


def test_shadow_moves_nothing(ranks: list[Any]) -> None:
    assert live(ranks, "shadow") == in_order().tolist()
    assert all("shadow, nothing moves" in line for line in ranks[0]["shadow"]["lines"])


@pytest.mark.parametrize("name", ["stop file", "elasticity_aware"])
def test_sglangs_own_planner_plans_where_it_is_to(ranks: list[Any], name: str) -> None:
    """A stop file is on one rank only."""
    for rank in ranks:
        assert ["stopped by" in line for line in rank[name]["lines"]] == [True] * (name == "stop file")


def test_the_map_of_static_dispatch_is_made_without_the_loop(found: list[Any]) -> None:
    ours, own = found[0]["seconds"]
    assert 5 * ours <= own, f"{1e3 * ours:.1f} ms, SGLang {1e3 * own:.1f} ms"


def test_its_recorders_files_are_read_and_it_reads_ours(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["files"] == {"_StatAccumulator": True, "_DetailAccumulator": True, "json": True, "pt": True}
