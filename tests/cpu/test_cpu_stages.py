"""The compiled stages one by one: against recorded states, and against the reference's stages on random states that
whole plans hardly reach. Row by row here, all rows at once there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

import eplb_reference.fixup
import eplb_reference.pack
import eplb_reference.refine
import eplb_reference.replicate
import eplb_reference.replicate_waterfill
from eplb_triton.policy import Donors, PeakEstimate, Tie
from tests.cases import FAMILIES, loads, stage_arrays, stage_groups
from tests.comparing import assert_each_same, assert_same

pytest.importorskip("eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError)

from eplb_triton.cpu import arith, fixup, pack, refine, replicate, replicate_waterfill, tournament
from eplb_triton.cpu.arith import Floats, Ints
from eplb_triton.cpu.compiled import runnable

new_work, new_trees = runnable(arith.new_work), runnable(tournament.new_trees)
descending_order = runnable(arith.descending_order)

NO_LIST = np.empty(0, np.int64)


def move(weights: Floats, counts: Ints, expert: Ints, rank: Ints, moves: int, donors: str, peak: str, tie: str) -> None:
    fields = get_args(Donors).index(donors), get_args(PeakEstimate).index(peak), get_args(Tie).index(tie)
    runnable(fixup.move_replicas)(weights, counts, expert, rank, moves, *fields, np.empty_like(weights))


def refined(rule: str, weights: Floats, labels: Ints, pack_of: Ints, slot_of: Ints, num_packs: int, *n: int) -> None:
    """Refine pack_of and slot_of in place."""
    work, totals = new_work(weights.size, num_packs), np.empty(num_packs)
    if rule == "nearest":
        runnable(refine.refine_nearest)(weights, pack_of, slot_of, num_packs, n[0], n[1], work, totals)
    elif rule == "corner":
        runnable(refine.refine_corner)(weights, pack_of, slot_of, num_packs, n[0], work, totals)
    else:
        runnable(refine.refine_peak)(weights, labels, pack_of, slot_of, num_packs, work, totals)


def spread(weights: Floats, labels: Ints, num_packs: int) -> tuple[Ints, Ints]:
    pack_of, slot_of = np.empty(weights.size, np.int64), np.empty(weights.size, np.int64)
    held = np.zeros((int(labels.max()) + 1, num_packs), np.int64)
    room = new_work(weights.size, num_packs), new_trees(1, num_packs)[0], held, np.empty(num_packs, np.float32)
    runnable(pack.pack_spread)(weights, labels, num_packs, pack_of, slot_of, *room)
    assert not held.any()
    return pack_of, slot_of


@pytest.mark.parametrize("group", stage_groups("fixup"))
def test_recorded_fixups(group: str) -> None:
    _, moves, donors, peak, tie = group.split("/")[1].split()
    state = {name: array.numpy() for name, array in stage_arrays(group).items()}
    for row, counts in enumerate(state["counts"]):
        move(state["weight"][row], counts, NO_LIST, NO_LIST, int(moves), donors, peak, tie)
        assert_same(counts, state["after"][row], f"counts of row {row}")


@pytest.mark.parametrize("group", stage_groups("refine"))
def test_recorded_refinements(group: str) -> None:
    num_packs, rule, *numbers = group.split("/")[1].split()
    state = {name: array.numpy() for name, array in stage_arrays(group).items()}
    for row in range(len(state["weight"])):
        before = [state[name][row] for name in ("weight", "labels", "pack", "slot")]
        refined(rule, *before, int(num_packs), *map(int, numbers))
        assert_same(state["pack"][row], state["pack_after"][row], f"packs of row {row}")
        assert_same(state["slot"][row], state["slot_after"][row], f"slots of row {row}")


@pytest.mark.parametrize("group", stage_groups("spread"))
def test_recorded_spreads(group: str) -> None:
    state = {name: array.numpy() for name, array in stage_arrays(group).items()}
    for row in range(len(state["weight"])):
        pack_of, slot_of = spread(state["weight"][row], state["labels"][row], int(group.split("/")[1]))
        assert_same(pack_of, state["pack"][row], f"packs of row {row}")
        assert_same(slot_of, state["slot"][row], f"slots of row {row}")


def states(experts: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and counts [rows, experts] of every family: counts as no policy would choose them."""
    rng = np.random.default_rng(seed)
    for family in FAMILIES:
        weights = loads(family, seed, 20, experts)
        yield weights, torch.from_numpy(rng.integers(1, 5, weights.shape))


@pytest.mark.parametrize("rule", ["pick_dhondt", "pick_sainte_lague", "pick_peak_aware", "pick_gated"])
@pytest.mark.parametrize("experts", [1, 2, 3, 7, 16, 17, 40])
def test_picks_from_any_counts(rule: str, experts: int) -> None:
    for weights, counts in states(experts, seed=10):
        expert, rank = torch.full((20, 12), -1), torch.full((20, 12), -1)
        ours = [tensor.numpy().copy() for tensor in (weights, counts, expert, rank)]
        getattr(eplb_reference.replicate, rule)(weights, counts, expert, rank, 3, 11)
        for row in range(20):
            runnable(getattr(replicate, rule))(*(array[row] for array in ours), 3, 11, new_trees(3, experts))
        assert_each_same(ours, (weights, counts, expert, rank), "weights", "counts", "expert", "rank")


@pytest.mark.parametrize("rule", ["dispersion_tail", "simulated_tail"])
@pytest.mark.parametrize("experts", [1, 2, 5, 24])
def test_tails_over_rows(rule: str, experts: int) -> None:
    lengths = set()
    for weights, _ in states(experts, seed=11):
        for rows in (weights[:1], weights[:2], weights):
            for num_redundant in (1, 2, 5, 10, 11, 25, 64):
                length = runnable(getattr(replicate, rule))(rows.numpy(), num_redundant)
                assert length == getattr(eplb_reference.replicate, rule)(rows, num_redundant)
                lengths.add(int(length))
    assert len(lengths) >= 3


@pytest.mark.parametrize("experts", [1, 2, 3, 16, 40])
def test_waterfill_and_its_list(experts: int) -> None:
    for weights, _ in states(experts, seed=12):
        for num_replicas in (experts, experts + 1, 2 * experts + 3, 5 * experts):
            want = eplb_reference.replicate_waterfill.waterfill_counts(weights, num_replicas)
            want_list = eplb_reference.replicate_waterfill.list_by_expert(want)
            for row in range(20):
                counts, expert, rank = (np.empty(n, np.int64) for n in (experts, num_replicas, num_replicas))
                runnable(replicate_waterfill.waterfill_counts)(
                    weights[row].numpy(), num_replicas, counts, new_trees(3, experts)
                )
                assert_same(counts, want[row], f"counts of row {row}")
                runnable(replicate_waterfill.list_by_expert)(counts, expert, rank)
                assert_each_same([expert, rank], [column[row] for column in want_list], "expert", "rank")


FIXUPS = [
    fields
    for fields in product(get_args(Donors), get_args(PeakEstimate), get_args(Tie))
    if fields[1:] != ("exact", "second_peak")  # not defined: the middle one of three terms, of which exact has none
]


@pytest.mark.parametrize(("donors", "peak", "tie"), FIXUPS)
def test_fixups_that_no_policy_combines(donors: Donors, peak: PeakEstimate, tie: Tie) -> None:
    moved = 0
    for experts in (2, 3, 9):
        for weights, counts in states(experts, seed=13):
            before = counts[:1].expand(20, -1)
            want = before.clone(), *eplb_reference.replicate_waterfill.list_by_expert(before)
            ours = [tensor.numpy().copy() for tensor in want]
            eplb_reference.fixup.move_replicas(weights, *want, 3, donors, peak, tie)
            for row in range(20):
                move(weights[row].numpy(), ours[0][row], ours[1][row], ours[2][row], 3, donors, peak, tie)
            assert_each_same(ours, want, "counts", "expert", "rank")
            moved += int((want[0] != before).any(1).sum())
    assert moved > 0 or peak == "others"  # which never moves one


@pytest.mark.parametrize("num_packs", [1, 2, 3, 16, 17, 40])
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_packs_of_any_items(num_packs: int, capacity: int) -> None:
    """Labels that have nothing to do with the loads, and loads that differ by about the tolerance."""
    rng = np.random.default_rng(14)
    n = num_packs * capacity
    for family in FAMILIES:
        weights = loads(family, 14, 12, n)
        weights[4:] = (1 + 1e-6 * torch.from_numpy(rng.integers(0, 4, (8, n)))).to(torch.float32)
        labels = torch.from_numpy(rng.integers(0, 1 + n // 2, (12, n)))
        plain = eplb_reference.pack.pack_plain(weights, num_packs)
        spreads = eplb_reference.pack.pack_spread(weights, labels, num_packs)
        for row in range(12):
            pack_of, slot_of = np.empty(n, np.int64), np.empty(n, np.int64)
            room = new_work(n, num_packs), new_trees(1, num_packs)[0]
            runnable(pack.pack_plain)(weights[row].numpy(), num_packs, pack_of, slot_of, *room)
            assert_each_same([pack_of, slot_of], [tensor[row] for tensor in plain], "packs", "slots")
            got = spread(weights[row].numpy(), labels[row].numpy(), num_packs)
            assert_each_same(got, [tensor[row] for tensor in spreads], "packs", "slots")


@pytest.mark.parametrize("rule", ["nearest 2 1", "nearest 5 2", "corner 1", "corner 2", "corner 6", "peak"])
@pytest.mark.parametrize("num_packs", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_refinements_of_any_packing(rule: str, num_packs: int, capacity: int) -> None:
    name, *numbers = rule.split()
    rng = np.random.default_rng(15)
    n = num_packs * capacity
    for family in FAMILIES:
        weights = loads(family, 15, 20, n)
        labels = torch.from_numpy(rng.integers(0, 1 + n // 2, (20, n)))
        place = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (20, 1)), axis=1))
        pack_of, slot_of = place // capacity, place % capacity
        ours = pack_of.numpy().copy(), slot_of.numpy().copy()
        reference = getattr(eplb_reference.refine, f"refine_{name}")
        given = (weights, labels) if name == "peak" else (weights,)
        want = reference(*given, pack_of, slot_of, num_packs, *map(int, numbers))
        for row in range(20):
            state = weights[row].numpy(), labels[row].numpy(), ours[0][row], ours[1][row], num_packs
            refined(name, *state, *map(int, numbers))
        assert_each_same(ours, want, "packs", "slots")


def test_one_more_corner_step_where_the_gpus_are_uneven() -> None:
    rng = np.random.default_rng(16)
    given = set()
    for scale in (0.0, 0.001, 0.01, 1.0):
        weights = torch.from_numpy(1 + scale * rng.random((30, 12))).to(torch.float32)
        place = torch.arange(12).expand(30, -1)
        want = eplb_reference.refine.corner_gpu_steps(weights, place // 3, place % 3, 4, 2)
        for row in range(30):
            state = weights[row].numpy(), (place // 3)[row].numpy(), (place % 3)[row].numpy(), 4, 2
            steps = runnable(refine.corner_gpu_steps)(*state, new_work(12, 4), np.empty(4))
            assert steps == int(want.expand(30)[row] if want.numel() == 1 else want.view(30)[row])
            given.add(int(steps))
    assert given == {2, 3}


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 300, 3000])
def test_the_sort_is_stable(n: int) -> None:
    for family in FAMILIES:
        values = loads(family, 17, 1, n)[0].numpy() if n else np.empty(0, np.float32)
        order = descending_order(values, new_work(n, 1))
        assert_same(order, np.argsort(-values.astype(np.float64), kind="stable"), f"order of {family}")
