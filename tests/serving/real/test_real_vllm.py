"""Inside vLLM: its own EplbState on three ranks of a CPU. Needs the folder of an unpacked wheel: docs/frameworks.md."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.serving.real.ranks import answers_of_program
from tests.serving.real.stub_model import EXPERTS, in_order

FOLDER = os.environ.get("EPLB_VLLM", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="EPLB_VLLM names no folder with vllm/ in it")

PLANNED = ("sync", "async", "async, batched", "before the stop file", "stop file", "after the stop file", "split")
KEPT = ("profile", "shadow", "sync, another plan on rank 1", "async, another plan on rank 1")
ELASTIC = ("scale up", "scale down")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of one process, of each rank, and all that is printed."""
    stop = str(tmp_path_factory.mktemp("real") / "stop")
    environment = {"EPLB_TRITON_BACKEND": "reference", "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "EPLB_TRITON_"}
    return answers_of_program("vllm_ranks", FOLDER, EPLB_REAL_STOP=stop, **environment)


def maps(ranks: list[Any], name: str) -> list[Any]:
    """Of each model, after checking that all ranks have the same."""
    of_ranks = [[model["map"] for model in rank[name]["models"]] for rank in ranks]
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    return of_ranks[0]


def lines(ranks: list[Any], name: str) -> list[list[str]]:
    return [rank[name]["lines"] for rank in ranks]


def test_the_entry_point_replaces_the_policy_and_the_logical_maps(found: list[Any]) -> None:
    for policy in (found[0]["module"], *(rank["policy"] for rank in found[1])):
        assert policy == "eplb_triton.integrations.vllm"


def test_rays_workers_get_the_variables(found: list[Any]) -> None:
    assert {"EPLB_TRITON_VLLM", "EPLB_TRITON_BACKEND"} <= set(found[0]["ray"])


def test_the_lines_of_plans_are_among_vllms(found: list[Any]) -> None:
    """In its format; rank 0 alone says what was planned."""
    plans = [line for line in found[2] if "policy=steady" in line]
    assert len(plans) == sum("policy=steady" in line for name in found[1][0] for line in _said(found[1][0][name]))
    assert all("INFO" in line and "[replanner.py:" in line for line in plans)


def _said(answer: Any) -> list[str]:
    return answer["lines"] if isinstance(answer, dict) else []


def test_logical_maps_are_vllms_on_1000_random_maps_and_five_times_as_fast(found: list[Any]) -> None:
    assert found[0]["equal"] == 1000
    for layers, (ours, own) in found[0]["seconds"].items():
        assert 5 * ours <= own, f"{layers} layers: {1e3 * ours:.2f} ms, vLLM {1e3 * own:.2f} ms"


@pytest.mark.parametrize("name", [*PLANNED, *KEPT, *ELASTIC, "sync, two models", "async, two models"])
def test_weights_are_where_the_map_says_and_tokens_find_them(ranks: list[Any], name: str) -> None:
    for slots in maps(ranks, name):
        assert all(set(row) == set(range(EXPERTS)) for row in slots)
    for rank in ranks:
        for model in rank[name]["models"]:
            assert model["wrong"] == []
            assert model["dispatch"]
            assert model["maps fit"] != (name == "split")


@pytest.mark.parametrize("name", PLANNED)
def test_maps_change(ranks: list[Any], name: str) -> None:
    assert all(slots != in_order().tolist() for slots in maps(ranks, name))


def test_the_worker_thread_plans_as_the_main_thread_does(ranks: list[Any]) -> None:
    assert maps(ranks, "sync") == maps(ranks, "async")


@pytest.mark.parametrize("name", KEPT)
def test_maps_are_kept_and_it_is_said_why(ranks: list[Any], name: str) -> None:
    assert maps(ranks, name) == [in_order().tolist()]
    for rank, said in enumerate(lines(ranks, name)):
        if "another" in name:
            assert said == [f"rank {rank}: ranks differ in plan; the placement in force is kept"] * 2


def test_one_rank_with_a_stop_file_stops_all_and_they_agree_afterwards(ranks: list[Any]) -> None:
    for said in lines(ranks, "stop file"):
        assert len(said) == 1
        assert "the framework's own planner plans" in said[0]
    after = lines(ranks, "after the stop file")
    assert [len(said) for said in after] == [2, 0, 0]
    assert all("policy=steady" in line for line in after[0])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_two_equal_models_in_one_state_are_planned_as_each_alone(ranks: list[Any], way: str) -> None:
    alone = [maps(ranks, f"{way}, model {seed} alone")[0] for seed in (1, 2)]
    assert maps(ranks, f"{way}, two models") == alone
    assert alone[0] != alone[1]


def test_a_rank_that_joins_is_filled_and_one_that_leaves_takes_nothing_with_it(ranks: list[Any]) -> None:
    (up,), (down,) = (maps(ranks, name) for name in ELASTIC)
    assert {len(row) for row in up} == {24}
    assert {len(row) for row in down} == {16}
    for name in ELASTIC:
        said = lines(ranks, name)[0]
        assert said, name
        assert all("policy=" in line for line in said), said
