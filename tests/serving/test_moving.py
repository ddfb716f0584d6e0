"""Weights move to where the map says, or nowhere: four processes, and faults planted on one of them only."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from eplb_triton import Placement, Topology
from eplb_triton.serving import MoveError, Transfers, WeightsMoved, moving, own_group
from eplb_triton.serving.moving import move_weights
from tests.serving.ranks import run_ranks

RANKS, LAYERS, SLOTS, EXPERTS, DYING = 4, 3, 5, 14, 2
KINDS = [
    (torch.bfloat16, (6, 4)),
    (torch.float8_e4m3fn, (3,)),
    (torch.int8, (2, 5)),
    (torch.float32, ()),  # a scale a slot
    (torch.bool, (3,)),
    (torch.float16, (0,)),
]
SLOT_BYTES = 48 + 3 + 10 + 4 + 3


def maps(seed: int, ranks: int) -> Placement:
    """Every expert at least once, where a generator of that seed has it."""
    generator = torch.Generator().manual_seed(seed)
    replicas = ranks * SLOTS
    experts = min(EXPERTS, replicas)
    slots = torch.stack([torch.randperm(replicas, generator=generator) % experts for _ in range(LAYERS)])
    return Placement.from_phy2log(slots, experts, Topology(num_replicas=replicas, num_gpus=ranks, num_nodes=2))


def weights(placement: Placement, rank: int) -> list[list[Tensor]]:
    """What the slots of a rank hold: of every layer and expert other bits, NaN among them."""
    return [
        [torch.stack([expert_weight(layer, expert, kind) for expert in row]) for kind in range(len(KINDS))]
        for layer, row in enumerate(placement.phy2log[:, rank * SLOTS : (rank + 1) * SLOTS].tolist())
    ]


def expert_weight(layer: int, expert: int, kind: int) -> Tensor:
    dtype, shape = KINDS[kind]
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + kind)
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    drawn = torch.randint(2 if dtype == torch.bool else 256, (size,), generator=generator)
    return drawn.to(torch.uint8).view(dtype).view(shape)


def same(mine: list[list[Tensor]], its: list[list[Tensor]]) -> bool:
    """Bit for bit, which NaN is not."""
    pairs = [pair for layers in zip(mine, its, strict=True) for pair in zip(*layers, strict=True)]
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def attempt(
    held: list[list[Tensor]], todo: Transfers, **options: Any
) -> WeightsMoved | tuple[str, str, tuple[int, ...]]:
    try:
        return move_weights(held, todo, **options)
    except (MoveError, ValueError) as error:
        return type(error).__name__, str(error), getattr(error, "ranks", ())


def on_rank(rank: int) -> dict[str, Any]:
    """All scenarios in turn: four processes are started once."""
    live, ahead, other = (maps(seed, RANKS) for seed in range(3))
    before, todo = weights(live, rank), ahead.transfers(live)
    found: dict[str, Any] = {}

    held = weights(live, rank)
    found["moved"] = attempt(held, todo), same(held, weights(ahead, rank))

    held = weights(live, rank)
    each = [attempt(held[layer : layer + 1], todo.of(layer), control=own_group()) for layer in range(LAYERS)]
    found["by layer"] = each, same(held, weights(ahead, rank))

    pair = distributed.new_group([1, 3])
    if rank in (1, 3):
        two, place = [maps(seed, 2) for seed in range(2)], rank // 2
        held = weights(two[0], place)
        found["pair"] = attempt(held, two[1].transfers(two[0]), group=pair), same(held, weights(two[1], place))

    odd = rank == 1
    held = weights(live, rank)
    found["other map"] = attempt(held, other.transfers(live) if odd else todo), same(held, before)
    wrong = [[part[:-1] for part in parts] for parts in held]
    found["wrong tensors"] = attempt(wrong if odd else held, todo), same(held, before)

    group, control = distributed.new_group(), own_group()  # spent afterwards
    started = time.monotonic()
    found["absent"] = None if odd else (attempt(held, todo, group=group, timeout=3.0), same(held, before))
    found["absent for"] = time.monotonic() - started
    distributed.barrier()

    group, control = distributed.new_group(), own_group()
    as_it_is = moving._do_jobs
    if odd:
        moving._do_jobs = lambda *_: time.sleep(20)
    found["hangs"] = attempt(held, todo, group=group, control=control, timeout=3.0), same(held, before)
    moving._do_jobs = as_it_is

    everything: list[Any] = [None] * RANKS
    distributed.all_gather_object(everything, found)
    if rank == DYING:
        moving._do_jobs = die_halfway
    return {"all": everything, "killed": (attempt(held, todo, timeout=30.0), same(held, before))}


def die_halfway(work: moving._Work, group: distributed.ProcessGroup | None) -> None:
    """After the first transfers of this rank: others have received from it."""
    del work.jobs[2:]
    as_it_was(work, group)
    os.kill(os.getpid(), signal.SIGKILL)


as_it_was = moving._do_jobs


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(on_rank, RANKS, tmp_path_factory.mktemp("ranks"), dying=DYING)


@pytest.fixture(scope="module")
def ranks(outcomes: list[Any]) -> list[dict[str, Any]]:
    everything: list[dict[str, Any]] = outcomes[0]["all"]
    return everything


def test_every_slot_holds_what_the_map_says(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["moved"][1] for rank in ranks)
    assert all(rank["by layer"][1] for rank in ranks)
    assert all(ranks[number]["pair"][1] for number in (1, 3))


def test_bytes_are_slots_times_the_size_of_a_slot(ranks: list[dict[str, Any]]) -> None:
    live, ahead = maps(0, RANKS), maps(1, RANKS)
    total = ahead.transfers(live).total()
    moved = [rank["moved"][0] for rank in ranks]
    assert sum(one.slots_fetched for one in moved) == sum(one.slots_sent for one in moved) == total["fetched"] > 0
    assert sum(one.slots_copied for one in moved) == total["copied"] > 0
    assert [one.bytes_sent for one in moved] == [one.slots_sent * SLOT_BYTES for one in moved]
    assert [one.bytes_received for one in moved] == [one.slots_fetched * SLOT_BYTES for one in moved]
    assert {one.batches for one in moved} == {total["batches"]}
    for rank, one in zip(ranks, moved, strict=True):
        assert sum(layer.bytes_sent for layer in rank["by layer"][0]) == one.bytes_sent


@pytest.mark.parametrize(
    ("what", "message", "at_fault"),
    [
        ("other map", "rank 1 has other transfers or tensors than rank 0", (1,)),
        ("wrong tensors", "rank 1 cannot move weights and says why itself", (1,)),
        ("absent", "rank 1 did not answer", (1,)),
        ("hangs", "rank 1 did not finish; rank 0 waits for rank ", (1,)),
    ],
)
def test_a_fault_on_one_rank_is_named_on_every_rank_and_writes_nothing(
    ranks: list[dict[str, Any]], what: str, message: str, at_fault: tuple[int, ...]
) -> None:
    for number, rank in enumerate(ranks):
        if number == 1 and what in ("absent", "wrong tensors"):
            continue
        (name, said, named), untouched = rank[what]
        assert (name, untouched, named) == ("MoveError", True, at_fault), said
        assert said.startswith(message)
        assert "nothing was written" in said
    (name, said, _), untouched = ranks[1]["wrong tensors"]
    assert (name, untouched) == ("ValueError", True)
    assert said.startswith("tensors[0][0] has shape (4, 6, 4), must be [slots of this GPU=5, ...]")
    assert max(rank["absent for"] for rank in ranks) < 10


def test_a_killed_rank_is_named_and_the_others_keep_what_they_had(outcomes: list[Any]) -> None:
    assert outcomes[DYING] is None
    for rank in (0, 1, 3):
        (name, said, named), untouched = outcomes[rank]["killed"]
        assert (name, untouched, named) == ("MoveError", True, (DYING,)), said
        assert said.startswith(f"rank {DYING} did not answer; nothing was written on any rank")


def test_a_process_alone_copies() -> None:
    live, ahead = (maps(seed, 1) for seed in range(2))
    held = weights(live, 0)
    moved = move_weights(held, ahead.transfers(live))
    assert same(held, weights(ahead, 0))
    assert (moved.slots_fetched, moved.bytes_sent, moved.slots_copied) == (0, 0, int(ahead.moved(live).slots.sum()))


def test_ranks_need_a_backend_for_the_cpu_to_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent: all ranks have the same backends, so that all refuse."""
    monkeypatch.setattr(distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(distributed, "get_world_size", lambda _: 2)
    monkeypatch.setattr(distributed, "get_backend_config", lambda _: "cuda:nccl")
    live = maps(0, 2)
    with pytest.raises(
        ValueError, match=r"group has backends cuda:nccl, none for the CPU; pass control=agreement.own_"
    ):
        move_weights(weights(live, 0), live.transfers(live), object())  # type: ignore[arg-type]


def test_refusals() -> None:
    live, ahead = (maps(seed, 1) for seed in range(2))
    held, todo = weights(live, 0), ahead.transfers(live)
    with pytest.raises(ValueError, match="tensors has 2 layers, must have 3 like transfers"):
        move_weights(held[:2], todo)
    turned = [[torch.zeros(SLOTS, 3, 4).transpose(1, 2)] for _ in range(LAYERS)]
    with pytest.raises(ValueError, match=r"tensors\[0\]\[0\] has strides \(12, 1, 4\), must have each slot contiguous"):
        move_weights(turned, todo)
    todo.source[1, 2] = -1
    with pytest.raises(ValueError, match="layer 1, slot 2: no slot of the placement in force holds its expert"):
        move_weights(held, todo)
    assert same(held, weights(live, 0))
