"""Refine: swap items between a heavy and a light pack.

State of a call, one row per (layer, node) or per layer:
    loads      [rows, n] float32, load of each item
    pack, slot [rows, n] int64, where each item is; every pack holds n / num_packs items

Every `refine_*` returns new (pack, slot). A swap exchanges the positions of two items; an item keeps its index.
Pack loads are float64: at first the sum of their items' loads in slot order, then carried from swap to swap.
Nothing is done where a pack holds one item or there is one pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eplb_reference.arith import bottom_two, columns, ordered_mean, ordered_sum
from eplb_triton.constants import EPSILON, GOOD_SWAP, LEVEL, UNBALANCED_AFTER_STEP, UNBALANCED_AT_START


@dataclass
class _State:
    loads: Tensor  # [rows, n] float64, exact copies of the float32 loads
    pack: Tensor  # [rows, n]
    slot: Tensor  # [rows, n]
    pack_load: Tensor  # [rows, num_packs] float64

    @classmethod
    def start(cls, loads: Tensor, pack: Tensor, slot: Tensor, num_packs: int) -> _State:
        return cls(loads.to(torch.float64), pack.clone(), slot.clone(), _pack_loads(loads, pack, slot, num_packs))

    def items(self, pack: Tensor) -> Tensor:
        """Items [rows, S] of one `pack` [rows, 1] a row, lowest index first."""
        return (self.pack == pack).nonzero()[:, 1].view(pack.shape[0], -1)

    def swap(self, apply: Tensor, i: Tensor, j: Tensor) -> None:
        """Exchange items i and j [rows, 1] in the rows of `apply` [rows, 1]; carry their packs' loads."""
        w_i, w_j = self.loads.gather(1, i), self.loads.gather(1, j)
        for item, leaves, enters in ((i, w_i, w_j), (j, w_j, w_i)):
            pack = self.pack.gather(1, item)
            before = self.pack_load.gather(1, pack)
            self.pack_load.scatter_(1, pack, torch.where(apply, (before - leaves) + enters, before))
        for position in (self.pack, self.slot):
            at_i, at_j = position.gather(1, i), position.gather(1, j)
            position.scatter_(1, i, torch.where(apply, at_j, at_i))
            position.scatter_(1, j, torch.where(apply, at_i, at_j))


def refine_nearest(
    loads: Tensor, pack: Tensor, slot: Tensor, num_packs: int, steps: int, lights: int
) -> tuple[Tensor, Tensor]:
    """Up to `steps` times, the swap between the heaviest pack and one of the `lights` lightest that comes nearest to
    levelling the two.

    Ties: the lighter pack, then the lowest item of the heavy pack, then the lowest of the light one.
    """
    if num_packs == 1 or loads.shape[1] == num_packs:
        return pack, slot
    state = _State.start(loads, pack, slot, num_packs)
    for _ in range(steps):
        heavy = state.pack_load.argmax(1, keepdim=True)
        light = bottom_two(state.pack_load)[:, :lights]
        difference = state.pack_load.gather(1, heavy) - state.pack_load.gather(1, light)
        usable = (light != heavy) & (difference > LEVEL)
        score, i, j = _nearest_pairs(state, heavy, light, difference)
        best = torch.where(usable, score, torch.inf).argmin(1, keepdim=True)
        apply = usable.gather(1, best) & (score.gather(1, best) < difference.gather(1, best) - LEVEL)
        state.swap(apply, i.gather(1, best), j.gather(1, best))
    return state.pack, state.slot


def _nearest_pairs(state: _State, heavy: Tensor, light: Tensor, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every light pack, the best score and its items i of `heavy` and j of `light`, all [rows, lights].

    One item of the heavy pack at a time: all pairs at once take S² entries, gigabytes for two packs of thousands.
    """
    of_heavy = state.items(heavy)
    of_light = torch.stack([state.items(pack) for pack in columns(light)], 1)  # [rows, lights, S]
    w_light = state.loads.unsqueeze(1).expand(-1, light.shape[1], -1).gather(2, of_light)
    score = torch.full_like(difference, torch.inf)
    best_i, best_j = torch.zeros_like(light), torch.zeros_like(light)
    for i in columns(of_heavy):
        pair_scores = (difference.unsqueeze(2) - 2 * (state.loads.gather(1, i).unsqueeze(2) - w_light)).abs()
        lowest, place = pair_scores.min(2)
        better = lowest < score
        score = torch.where(better, lowest, score)
        best_i = torch.where(better, i, best_i)
        best_j = torch.where(better, of_light.gather(2, place.unsqueeze(2)).squeeze(2), best_j)
    return score, best_i, best_j


def refine_corner(
    loads: Tensor, pack: Tensor, slot: Tensor, num_packs: int, steps: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Up to `steps` (of all rows, or [rows, 1]) times: swap one of the two heaviest items of the heaviest pack with one
    of the two lightest of the two lightest other packs; where no such swap gains, both with both of the lightest.

    Ties: the lighter pack, then the heavier item of the heavy pack, then the lighter one of the light pack; among
    equal items the lowest.
    """
    if num_packs == 1 or loads.shape[1] == num_packs:
        return pack, slot
    state = _State.start(loads, pack, slot, num_packs)
    steps = torch.as_tensor(steps, dtype=torch.int64, device="cpu").expand(loads.shape[0], 1)
    allowed, going, step = steps, steps > 0, 0
    while bool(going.any()):
        single, double, content = _corner_step(state, going)
        stop = torch.zeros_like(going)
        if step == 0:
            another = single & (steps == 1) & (_imbalance(state.pack_load) > UNBALANCED_AFTER_STEP)
            allowed = allowed + another.to(torch.int64)
            stop = single & (steps >= 2) & content
        step += 1
        going = (single | double) & ~stop & (step < allowed)
    return state.pack, state.slot


def corner_gpu_steps(loads: Tensor, pack: Tensor, slot: Tensor, num_packs: int, steps: int) -> Tensor:
    """Steps [rows, 1] that `refine_corner` takes on GPUs: one more where their starting loads are unequal."""
    return steps + (_imbalance(_pack_loads(loads, pack, slot, num_packs)) > UNBALANCED_AT_START).to(torch.int64)


def _corner_step(state: _State, going: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step in the rows of `going`: whether each made a single swap, whether it exchanged two items for two, and
    whether a single swap, if made, closed a good part of the difference. All [rows, 1]."""
    num_packs = state.pack_load.shape[1]
    heavy = state.pack_load.argmax(1, keepdim=True)
    others = state.pack_load.scatter(1, heavy, torch.inf)
    light = bottom_two(others)[:, : num_packs - 1]
    difference = state.pack_load.gather(1, heavy) - state.pack_load.gather(1, light)  # [rows, lights]
    heaviest = _extreme_two(state, heavy, descending=True)
    lightest = torch.stack([_extreme_two(state, pack, descending=False) for pack in columns(light)], 1)
    w_i = state.loads.gather(1, heaviest)  # [rows, 2]
    w_j = state.loads.gather(1, lightest.flatten(1)).view_as(lightest)  # [rows, lights, 2]
    # [rows, lights, 2, 2] in nesting order, so that the first smallest is the lowest in flat order.
    scores = (difference[:, :, None, None] - 2 * (w_i[:, None, :, None] - w_j[:, :, None, :])).abs()
    scores = torch.where((difference > LEVEL)[:, :, None, None], scores, torch.inf).flatten(1)
    best = scores.argmin(1, keepdim=True)
    score, chosen = scores.gather(1, best), best // 4
    difference_chosen = difference.gather(1, chosen)
    single = going & (score < difference_chosen - LEVEL)
    content = score <= GOOD_SWAP * difference_chosen

    difference_first, w_j1, w_j2 = difference[:, :1], w_j[:, 0, :1], w_j[:, 0, 1:]
    both = (difference_first - 2 * (((w_i[:, :1] + w_i[:, 1:]) - w_j1) - w_j2)).abs()
    double = going & ~single & (both < difference_first - LEVEL)

    state.swap(single, heaviest.gather(1, best // 2 % 2), lightest.flatten(1).gather(1, 2 * chosen + best % 2))
    for k in (0, 1):
        state.swap(double, heaviest[:, k : k + 1], lightest[:, 0, k : k + 1])
    return single, double, content


def _extreme_two(state: _State, pack: Tensor, *, descending: bool) -> Tensor:
    """The two heaviest (or lightest) items [rows, 2] of one `pack` [rows, 1] a row; ties: lowest item."""
    items = state.items(pack)
    order = state.loads.gather(1, items).argsort(dim=1, descending=descending, stable=True)
    return items.gather(1, order[:, :2])


def refine_peak(loads: Tensor, labels: Tensor, pack: Tensor, slot: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """One swap between the two heaviest and the three lightest packs, judged by the key (largest pack load after,
    largest - smallest after, replicas that would meet another of their expert).

    Args:
        labels: [rows, n] int64, expert of each item.

    Ties: the heavier donor (on equal loads the higher pack), the lighter receiver (the lower pack), the heavier item
    of the donor, the lighter one of the receiver; among equal items the lowest.
    """
    if num_packs <= 2 or loads.shape[1] == num_packs:
        return pack, slot  # of two packs both are donors, and none receives
    state = _State.start(loads, pack, slot, num_packs)
    order = state.pack_load.argsort(dim=1, stable=True)
    donors, receivers = order[:, -2:].flip(1), order[:, : min(3, num_packs - 2)]
    heaviest = torch.stack([_extreme_two(state, pack, descending=True) for pack in columns(donors)], 1)
    lightest = torch.stack([_extreme_two(state, pack, descending=False) for pack in columns(receivers)], 1)
    lowest, highest = state.pack_load.aminmax(dim=1, keepdim=True)
    spread = highest - lowest
    candidates = _peak_candidates(state, labels, donors, receivers, heaviest, lightest)
    key = [torch.full_like(highest, torch.inf) for _ in range(3)]
    i, j = torch.zeros_like(order[:, :1]), torch.zeros_like(order[:, :1])
    for valid, *new_key, new_i, new_j in zip(*(columns(column) for column in candidates), strict=True):
        smaller = valid & (
            (new_key[0] < key[0])
            | ((new_key[0] == key[0]) & ((new_key[1] < key[1]) | ((new_key[1] == key[1]) & (new_key[2] < key[2]))))
        )
        key = [torch.where(smaller, new, old) for new, old in zip(new_key, key, strict=True)]
        i, j = torch.where(smaller, new_i, i), torch.where(smaller, new_j, j)
    lower = key[0] + EPSILON < highest
    level = (key[0] - highest).abs() <= EPSILON
    state.swap((spread > 0) & (lower | (level & (key[1] + EPSILON < spread))), i, j)
    return state.pack, state.slot


def _peak_candidates(
    state: _State, labels: Tensor, donors: Tensor, receivers: Tensor, heaviest: Tensor, lightest: Tensor
) -> tuple[Tensor, ...]:
    """Columns [rows, candidates] in nesting order: valid, largest after, spread after, penalty, i, j."""
    shape = (donors.shape[0], donors.shape[1], receivers.shape[1], 2, 2)
    donor = donors[:, :, None, None, None].expand(shape).flatten(1)
    receiver = receivers[:, None, :, None, None].expand(shape).flatten(1)
    i = heaviest[:, :, None, :, None].expand(shape).flatten(1)
    j = lightest[:, None, :, None, :].expand(shape).flatten(1)
    w_i, w_j = state.loads.gather(1, i), state.loads.gather(1, j)
    donor_load, receiver_load = state.pack_load.gather(1, donor), state.pack_load.gather(1, receiver)
    after = state.pack_load.unsqueeze(1).repeat(1, donor.shape[1], 1)
    after.scatter_(2, donor.unsqueeze(2), ((donor_load - w_i) + w_j).unsqueeze(2))
    after.scatter_(2, receiver.unsqueeze(2), ((receiver_load - w_j) + w_i).unsqueeze(2))
    lowest, highest = after.aminmax(dim=2)
    penalty = _meets(state, labels, j, donor) + _meets(state, labels, i, receiver)
    return donor_load > receiver_load, highest, highest - lowest, penalty, i, j


def _meets(state: _State, labels: Tensor, item: Tensor, pack: Tensor) -> Tensor:
    """1.0 where `pack`, as it stands, holds a replica of the expert of `item`, all [rows, candidates]."""
    in_pack = state.pack.unsqueeze(1) == pack.unsqueeze(2)
    same = labels.unsqueeze(1) == labels.gather(1, item).unsqueeze(2)
    return (in_pack & same).any(2).to(torch.float64)


def _imbalance(pack_load: Tensor) -> Tensor:
    """(max - min) / mean [rows, 1] of pack loads [rows, m]."""
    lowest, highest = pack_load.aminmax(dim=1, keepdim=True)
    return (highest - lowest) / ordered_mean(pack_load).clamp(min=EPSILON).unsqueeze(1)


def _pack_loads(loads: Tensor, pack: Tensor, slot: Tensor, num_packs: int) -> Tensor:
    """[rows, num_packs] float64: loads of the items of each pack, summed in slot order."""
    capacity = loads.shape[1] // num_packs
    in_place = torch.empty_like(loads).scatter_(1, pack * capacity + slot, loads)
    return ordered_sum(in_place.view(loads.shape[0], num_packs, capacity))
