"""Fix-up where GPUs have two slots: moves of single replicas, judged on the largest pair of the best pairing."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import HIGHEST, LOWEST, at, bits, divide, from_bits, largest, smallest
from eplb_triton.kernels.fixed import INDEX, LABEL_SHIFT, label_of
from eplb_triton.kernels.sorting import sort_descending

PAIR_GAIN = tl.constexpr(constants.PAIR_GAIN)  # of the largest pair: a smaller gain is none


@triton.jit
def move_paired(
    replicas,
    counts,  # int32 [expert_lanes], with a sum of 2 * num_packs
    rule: tl.constexpr,  # Pairing
    shape: tl.constexpr,  # Replicating
):
    """For packs of two: up to `rule.moves` times, move a replica where that most lowers the largest pair of the best
    pairing, from one of the `rule.donors` experts of smallest load / (count - 1) to one of the largest pair. Returns
    the new counts. Ties: the first largest pair; the donor of smaller load / (count - 1), then the lower; the heavier
    receiver."""
    NUM_EXPERTS: tl.constexpr = shape.num_experts
    NUM_PACKS: tl.constexpr = shape.num_packs
    expert = tl.arange(0, shape.expert_lanes)
    loads = tl.load(replicas.loads + expert, mask=expert < NUM_EXPERTS, other=0.0)
    step = 0
    going = True
    while (step < rule.moves) & going:
        keys = sort_descending(tl.where(expert < NUM_EXPERTS, _key(loads, counts, expert), -1), replicas.keys)
        tl.store(replicas.keys + expert, keys)
        tl.debug_barrier()
        value, heavy, light = _largest_pair(replicas, NUM_PACKS, NUM_EXPERTS, shape.expert_lanes)
        givers = tl.where(counts > 1, bits(divide(loads, tl.maximum(counts - 1, 1))), HIGHEST)
        best = from_bits(tl.full((), 0x7F800000, tl.int32))  # infinity
        best_donor = 0
        best_receiver = 0
        for candidate in tl.range(0, 2 * rule.donors):
            key, donor = smallest(givers, expert)
            receiver = tl.where(candidate % 2 == 0, heavy, light)
            count = at(counts, expert, receiver)
            allowed = (key < HIGHEST) & (receiver != donor) & (count < NUM_PACKS)
            if allowed:
                fewer = _key(from_bits(at(bits(loads), expert, donor)), at(counts, expert, donor) - 1, donor)
                more = _key(from_bits(at(bits(loads), expert, receiver)), count + 1, receiver)
                _sort_again(keys, fewer, more, replicas.keys)
                new_value, _, _ = _largest_pair(replicas, NUM_PACKS, NUM_EXPERTS, shape.expert_lanes)
                if new_value < best:
                    best = new_value
                    best_donor = donor
                    best_receiver = receiver
            givers = tl.where((candidate % 2 == 1) & (expert == donor), HIGHEST, givers)
        going = best + value * PAIR_GAIN < value
        if going:
            counts = counts - (expert == best_donor).to(tl.int32) + (expert == best_receiver).to(tl.int32)
        step += 1
    return counts


@triton.jit
def _key(load, count, expert):
    """An expert's sort key, int64: larger for a larger replica load, then for a lower number; and its count."""
    key = (bits(divide(load, tl.maximum(count, 1))).to(tl.int64) << 32) | count.to(tl.int64)
    return key | ((expert ^ INDEX) << LABEL_SHIFT).to(tl.uint32).to(tl.int64)


@triton.jit
def _sort_again(keys, fewer, more, keys_ptr):
    """Sorted `keys`, two of which become `fewer` and `more`, in order to memory: a sort takes much longer."""
    lane = tl.arange(0, keys.shape[0])
    label = label_of(keys)
    is_fewer = (label == label_of(fewer)) & (keys >= 0)
    is_more = (label == label_of(more)) & (keys >= 0)
    stays = ~(is_fewer | is_more)
    gone = tl.min(tl.where(is_fewer, lane, HIGHEST), 0)
    also_gone = tl.min(tl.where(is_more, lane, HIGHEST), 0)
    place = lane - (lane > gone).to(tl.int32) - (lane > also_gone).to(tl.int32)
    place += (keys < fewer).to(tl.int32) + (keys < more).to(tl.int32)
    tl.store(keys_ptr + place, keys, mask=stays)
    first = tl.sum((stays & (keys > fewer)).to(tl.int32), 0)
    second = tl.sum((stays & (keys > more)).to(tl.int32), 0)
    tl.store(keys_ptr + first + (more > fewer).to(tl.int32), fewer)
    tl.store(keys_ptr + second + (fewer > more).to(tl.int32), more)
    tl.debug_barrier()


@triton.jit
def _largest_pair(replicas, NUM_PACKS: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr):
    """The largest of the pairs of the best pairing, float32, and its two experts, heavier first; ties: the first.

    Replicas of an expert weigh the same: the sorted replicas are the sorted experts, `replicas.keys`, each as often as
    it counts. Lanes are experts by position: load descending, then number; `start` is the place of its first replica.
    """
    LAST: tl.constexpr = 2 * NUM_PACKS - 1
    expert = tl.arange(0, EXPERTS)
    key = tl.load(replicas.keys + expert)
    count = tl.where(expert < NUM_EXPERTS, (key & INDEX).to(tl.int32), 0)
    start = tl.cumsum(count, 0) - count
    tl.store(replicas.spare + expert, start, mask=expert < NUM_EXPERTS)
    tl.debug_barrier()
    load = from_bits((key >> 32).to(tl.int32))
    meets = (expert < NUM_EXPERTS) & (start < NUM_PACKS)
    last = tl.minimum(start + count, NUM_PACKS) - 1  # of its places in the heavier half: its partner is the heaviest
    partner = expert * 0
    step = EXPERTS // 2
    while step > 0:
        first = tl.load(replicas.spare + partner + step, mask=partner + step < NUM_EXPERTS, other=HIGHEST)
        partner = tl.where(first <= LAST - last, partner + step, partner)
        step = step // 2
    its_load = from_bits((tl.load(replicas.keys + partner) >> 32).to(tl.int32))
    top, heavy_at = largest(tl.where(meets, bits(load + its_load), LOWEST), expert)
    heavy = tl.load(replicas.keys + heavy_at)
    heavy_start = tl.load(replicas.spare + heavy_at)
    heavy_last = tl.minimum(heavy_start + (heavy & INDEX).to(tl.int32), NUM_PACKS) - 1
    # Of equal pairs of the heavier expert the first: its partner is the furthest back.
    place = tl.minimum(start + count - 1, LAST - heavy_start)
    equal = bits(load + from_bits((heavy >> 32).to(tl.int32))) == top
    fits = equal & (place >= start) & (place >= LAST - heavy_last) & (expert < NUM_EXPERTS)
    _, light_at = largest(tl.where(fits, place, LOWEST), expert)
    light = label_of(tl.load(replicas.keys + light_at))
    tl.debug_barrier()
    return from_bits(top), label_of(heavy), light
