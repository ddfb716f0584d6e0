"""Sorts of keys in memory, and lists of slots by expert: what they are, without another implementation beside them."""
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from eplb_triton import Topology
from eplb_triton.kernels.relabelling_launcher import relabel_spec, scratch
from eplb_triton.kernels.replanning_slots import list_slots
from eplb_triton.kernels.sorting import sort_descending
from tests.sizes import chosen

pytestmark = pytest.mark.other_triton


@triton.jit
def _sort(keys_ptr, scratch_ptr, LANES: tl.constexpr, LOOPED: tl.constexpr):
    lane = tl.arange(0, LANES)
    tl.store(keys_ptr + lane, sort_descending(tl.load(keys_ptr + lane), scratch_ptr, LOOPED))


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("lanes", chosen([32, 128, 256, 512, 2048], 32, 128, 512))
def test_sorts(lanes: int, looped: bool) -> None:
    random = torch.Generator().manual_seed(lanes)
    of_all_sizes = torch.randint(-(2**62), 2**62, (lanes,), generator=random)
    few = torch.randint(-2, 3, (lanes,), generator=random)
    ascending = torch.arange(lanes) - lanes // 2
    for keys in (of_all_sizes, few, ascending, ascending.flip(0), few * 0):
        found, room = keys.clone(), torch.full((lanes,), -7)
        _sort[(1,)](found, room, LANES=lanes, LOOPED=looped)
        assert (found[1:] <= found[:-1]).all()
        assert torch.equal(found.sort().values, keys.sort().values)


@triton.jit
def _list(memory, shape: tl.constexpr):
    list_slots(memory, shape)


@pytest.mark.parametrize("experts", [1, 5, 40])
@pytest.mark.parametrize("empty", [0.0, 0.3, 1.0])
def test_lists(experts: int, empty: float) -> None:
    """Of drawn slots, some of them empty: each expert's slots in turn, none left out, none twice."""
    topology = Topology(num_replicas=120, num_gpus=4)
    random = torch.Generator().manual_seed(experts)
    slots = torch.randint(0, experts, (120,), generator=random)
    slots[torch.rand(120, generator=random) < empty] = -1
    _, shape = relabel_spec(topology, experts)
    memory = scratch(shape, 1, "cpu")
    memory.ints.fill_(-777_777_777)  # no slot and no expert
    ints, at = memory.ints[0], shape.at
    ints[at.slot : at.slot + 120] = slots
    _list[(1,)](memory, shape=shape)
    link = ints[at.link : at.link + experts + 120].tolist()
    for expert in range(experts):
        listed, slot = [], link[expert]
        while slot != -1:
            listed.append(slot)
            slot = link[experts + slot]
        held = [slot for slot in range(120) if slots[slot] == expert]
        assert listed == held
        assert int(ints[at.count + expert]) == len(held)
        assert not held or int(ints[at.last + expert]) == held[-1]
