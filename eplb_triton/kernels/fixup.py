"""Fix-up: move single replicas from one expert to another where that is judged to lower the peak of replica loads."""
# ruff: noqa: N803, RET505
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import EPSILON, HIGHEST, at, bits, divide, float64, from_bits, largest, smallest


@triton.jit
def move_replicas(
    replicas,
    counts,  # int32 [expert_lanes]
    LISTED: tl.constexpr,  # whether there is a list of replicas, to be changed in place
    rule: tl.constexpr,  # Moving
    shape: tl.constexpr,  # Replicating
):
    """At most `rule.moves` moves; returns the counts. Ties: as `rule.tie` says, candidates in the order of the heavier
    donor, then the lighter receiver.

    Left out where no move can ever pass (a donor only gets heavier): under `others`, and under `exact`
    from three experts up."""
    if rule.peak == "second" or (rule.peak == "exact" and shape.num_experts == 2):
        for _ in tl.range(0, rule.moves):
            donor, receiver = _best_move(replicas.loads, counts, rule, shape)
            if donor >= 0:
                expert = tl.arange(0, shape.expert_lanes)
                last = at(counts, expert, donor) - 1
                following = at(counts, expert, receiver)
                counts = tl.where(expert == donor, last, tl.where(expert == receiver, following + 1, counts))
                if LISTED:
                    replica = tl.arange(0, shape.replica_lanes)
                    there = replica < shape.num_replicas
                    its_expert = tl.load(replicas.expert + replica, mask=there, other=-1)
                    its_rank = tl.load(replicas.rank + replica, mask=there, other=-1)
                    moved = (its_expert == donor) & (its_rank == last)
                    tl.debug_barrier()  # where threads are more than replicas, several have loaded the same one
                    tl.store(replicas.expert + replica, tl.where(moved, receiver, its_expert), mask=there)
                    tl.store(replicas.rank + replica, tl.where(moved, following, its_rank), mask=there)
                    tl.debug_barrier()
    return counts


@triton.jit
def _best_move(loads_ptr, counts, rule: tl.constexpr, shape: tl.constexpr):
    """Donor and receiver of the best move; donor -1: there is none."""
    expert = tl.arange(0, shape.expert_lanes)
    inside = expert < shape.num_experts
    loads = tl.load(loads_ptr + expert, mask=inside, other=0.0)
    average = tl.where(inside, bits(divide(loads, tl.maximum(counts, 1))), -2)
    heaviest, first = largest(average, expert)
    second = tl.max(tl.where(expert == first, -2, average), 0)
    giving = average
    if rule.donors == "replicated":
        giving = tl.where(inside & (counts < 2), -1, average)
    _, donor_1 = largest(giving, expert)
    _, donor_2 = largest(tl.where(expert == donor_1, -2, giving), expert)
    taking = tl.where(inside, average, HIGHEST)
    _, receiver_1 = smallest(taking, expert)
    _, receiver_2 = smallest(tl.where(expert == receiver_1, HIGHEST, taking), expert)

    current = from_bits(heaviest).to(tl.float64)
    others = from_bits(second).to(tl.float64)
    best = float64(float("inf"))
    best_second = float64(float("inf"))
    best_donor = -1
    best_receiver = -1
    for k in tl.static_range(4):
        donor = donor_1 if k < 2 else donor_2
        receiver = receiver_1 if k % 2 == 0 else receiver_2
        count_d = at(counts, expert, donor)
        new_d = _load_of(loads_ptr, donor, count_d - 1, rule)
        new_r = _load_of(loads_ptr, receiver, at(counts, expert, receiver) + 1, rule)
        peak = tl.maximum(new_d, new_r)
        below = tl.minimum(new_d, new_r)
        if rule.peak == "second":
            below = tl.maximum(below, tl.minimum(peak, others))
            peak = tl.maximum(peak, others)
        counted = (count_d > 1) & (donor != receiver) & (peak + float64(EPSILON) < current)
        precedes = peak < best
        if rule.tie == "second_peak":
            precedes = precedes | ((tl.abs(peak - best) <= float64(EPSILON)) & (below < best_second))
        if rule.tie == "lexicographic":
            earlier = (donor < best_donor) | ((donor == best_donor) & (receiver < best_receiver))
            lower = (below < best_second) | ((below == best_second) & earlier)
            precedes = precedes | ((peak == best) & lower)
        better = counted & precedes
        best = tl.where(better, peak, best)
        best_second = tl.where(better, below, best_second)
        best_donor = tl.where(better, donor, best_donor)
        best_receiver = tl.where(better, receiver, best_receiver)
    return best_donor, best_receiver


@triton.jit
def _load_of(loads_ptr, expert, count, rule: tl.constexpr):
    """Load of a replica as a float64 number: divided in float32 under `exact`, else in float64 (no count: not used)."""
    load = tl.load(loads_ptr + expert)
    some = tl.maximum(count, 1)
    if rule.peak == "exact":
        return divide(load, some).to(tl.float64)
    else:
        return load.to(tl.float64) / some.to(tl.float64)
