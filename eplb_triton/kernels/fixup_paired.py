"""Fix-up where GPUs have two slots: moves of single replicas, judged on the largest pair of the best pairing."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, LOWEST, at, bits, divide, from_bits, largest, owner_of_each, smallest
from eplb_triton.kernels.fixed import INDEX, LABEL_SHIFT, label_of

PAIR_GAIN = tl.constexpr(1e-6)  # of the largest pair: a smaller gain is none


@triton.jit
def move_paired(
    weights_ptr,  # float32 [NUM_EXPERTS]
    counts,  # int32 [EXPERTS], with a sum of 2 * NUM_PACKS
    NUM_PACKS: tl.constexpr,
    MOVES: tl.constexpr,
    DONORS: tl.constexpr,
    average_ptr,  # float32 [NUM_EXPERTS], scratch
    offsets_ptr,  # int32 [NUM_EXPERTS], scratch
    sorted_ptr,  # int64 [REPLICAS], scratch
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """For packs of two: up to MOVES times, move a replica where that most lowers the largest pair of the best pairing,
    from one of the DONORS experts of smallest w / (c - 1) to one of the largest pair. Returns the new counts.
    Ties: the first largest pair; the donor of smaller w / (c - 1), then the lower; the heavier receiver."""
    expert = tl.arange(0, EXPERTS)
    weights = tl.load(weights_ptr + expert, mask=expert < NUM_EXPERTS, other=0.0)
    step = 0
    going = True
    while (step < MOVES) & going:
        value, heavy, light = _largest_pair(
            weights, counts, expert, average_ptr, offsets_ptr, sorted_ptr, NUM_PACKS, NUM_EXPERTS, REPLICAS
        )
        givers = tl.where(counts > 1, bits(divide(weights, tl.maximum(counts - 1, 1))), HIGHEST)
        best = from_bits(tl.full((), 0x7F800000, tl.int32))  # infinity
        best_donor = 0
        best_receiver = 0
        for candidate in tl.range(0, 2 * DONORS):
            key, donor = smallest(givers, expert)
            receiver = tl.where(candidate % 2 == 0, heavy, light)
            allowed = (key < HIGHEST) & (receiver != donor) & (at(counts, expert, receiver) < NUM_PACKS)
            if allowed:
                after = counts - (expert == donor).to(tl.int32) + (expert == receiver).to(tl.int32)
                new_value, _, _ = _largest_pair(
                    weights, after, expert, average_ptr, offsets_ptr, sorted_ptr, NUM_PACKS, NUM_EXPERTS, REPLICAS
                )
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
def _largest_pair(
    weights,
    counts,
    expert,
    average_ptr,
    offsets_ptr,
    sorted_ptr,
    NUM_PACKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    """The largest of the pairs of the best pairing, float32, and its two experts, heavier first; ties: the first."""
    EXPERTS: tl.constexpr = expert.shape[0]
    tl.store(average_ptr + expert, divide(weights, tl.maximum(counts, 1)), mask=expert < NUM_EXPERTS)
    place = tl.arange(0, REPLICAS)
    owner, _ = owner_of_each(counts, expert, offsets_ptr, place, NUM_EXPERTS, EXPERTS)
    load = tl.load(average_ptr + owner, mask=place < 2 * NUM_PACKS, other=0.0)
    key = (
        (bits(load).to(tl.int64) << 32) | ((owner ^ INDEX) << LABEL_SHIFT).to(tl.uint32).to(tl.int64) | (place ^ INDEX)
    )
    tl.store(sorted_ptr + place, tl.sort(tl.where(place < 2 * NUM_PACKS, key, -1), descending=True))
    tl.debug_barrier()
    heavier = tl.load(sorted_ptr + place, mask=place < NUM_PACKS, other=0)
    lighter = tl.load(sorted_ptr + 2 * NUM_PACKS - 1 - place, mask=place < NUM_PACKS, other=0)
    pair = from_bits((heavier >> 32).to(tl.int32)) + from_bits((lighter >> 32).to(tl.int32))
    top, first = largest(tl.where(place < NUM_PACKS, bits(pair), LOWEST), place)
    heavy = label_of(tl.load(sorted_ptr + first))
    light = label_of(tl.load(sorted_ptr + 2 * NUM_PACKS - 1 - first))
    tl.debug_barrier()
    return from_bits(top), heavy, light
