"""Relabelling: the same plan with its GPUs and slots renumbered, so that experts stay where they are."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST

_SHARED = tl.constexpr(16)  # of a key: replicas shared, then the plan's GPU, the lowest highest
_GPU = tl.constexpr(0xFFFF)


@triton.jit(noinline=True)
def relabel_gpus(memory, shape: tl.constexpr):
    """memory.slot, a plan, becomes one that writes few slots of memory.before: in every node GPUs are paired by the
    replicas they share, most first; kept experts stay in their slots, the others fill the free ones in their order.

    Ties: the lowest GPU before, then the lowest of the plan; of equal experts, the lowest slots are kept."""
    _count_shared(memory, shape)
    _pair_gpus(memory, shape)
    _place(memory, shape)


@triton.jit
def _count_shared(memory, shape: tl.constexpr):
    """memory.shared [D, d]: replicas that each GPU before and each GPU of the plan on its node have in common."""
    S: tl.constexpr = shape.slots
    D: tl.constexpr = shape.gpus // shape.nodes
    start = 0
    while start < shape.gpus * D:
        at = start + tl.arange(0, shape.lanes)
        inside = at < shape.gpus * D
        old = at // D * S
        new = (at // D // D * D + at % D) * S
        shared = tl.zeros((shape.lanes,), tl.int32)
        for j in tl.range(0, S):
            expert = tl.load(memory.ints + shape.at.slot + new + j, mask=inside, other=-1)
            left = tl.zeros(
                (shape.lanes,), tl.int32
            )  # of the old GPU's replicas of it, those that no slot before j has
            for i in tl.range(0, S):
                left += (tl.load(memory.ints + shape.at.before + old + i, mask=inside, other=-2) == expert).to(tl.int32)
                before = tl.load(memory.ints + shape.at.slot + new + i, mask=inside & (i < j), other=-2)
                left -= (before == expert).to(tl.int32)
            shared += (left > 0).to(tl.int32)
        tl.store(memory.ints + shape.at.shared + at, shared, mask=inside)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit
def _pair_gpus(memory, shape: tl.constexpr):
    """memory.partner: the GPU of the plan that each GPU before becomes.

    Each keeps its best partner, which may have gone to another since: then it looks again when its turn comes."""
    D: tl.constexpr = shape.gpus // shape.nodes
    gpu = tl.arange(0, shape.gpu_lanes)
    inside = gpu < shape.gpus
    key = tl.full((shape.gpu_lanes,), -1, tl.int32)
    for partner in tl.range(0, D):
        shared = tl.load(memory.ints + shape.at.shared + gpu * D + partner, mask=inside, other=0)
        key = tl.maximum(key, (shared << _SHARED) | (_GPU - partner))
    key = tl.where(inside, key, -1)
    tl.store(memory.ints + shape.at.taken + gpu, tl.zeros_like(gpu), mask=inside)
    tl.debug_barrier()
    most = tl.max(key >> _SHARED, 0)
    while most > 0:
        old = tl.min(tl.where((key >> _SHARED) == most, gpu, HIGHEST), 0)
        best = _GPU - (tl.max(tl.where(gpu == old, key, -1), 0) & _GPU)
        first = old // D * D
        its_key = tl.full((), -1, tl.int32)
        if tl.load(memory.ints + shape.at.taken + first + best) == 0:
            tl.debug_barrier()
            tl.store(memory.ints + shape.at.taken + first + best, 1)
            tl.store(memory.ints + shape.at.partner + old, first + best)
        else:
            at = tl.arange(0, shape.gpu_lanes)
            free = (at < D) & (tl.load(memory.ints + shape.at.taken + first + at, mask=at < D, other=1) == 0)
            shared = tl.load(memory.ints + shape.at.shared + old * D + at, mask=free, other=0)
            its_key = tl.max(tl.where(free, (shared << _SHARED) | (_GPU - at), -1), 0)
        key = tl.where(gpu == old, its_key, key)
        most = tl.max(key >> _SHARED, 0)
        tl.debug_barrier()
    _pair_the_rest(key, gpu, memory, shape)


@triton.jit
def _pair_the_rest(key, gpu, memory, shape: tl.constexpr):
    """GPUs that share nothing with any that is left, in order: as many of each node's before as of its plan's."""
    inside = gpu < shape.gpus
    free = (inside & (tl.load(memory.ints + shape.at.taken + gpu, mask=inside, other=1) == 0)).to(tl.int32)
    tl.store(memory.ints + shape.at.order + tl.cumsum(free, 0) - 1, gpu, mask=free != 0)
    tl.debug_barrier()
    left = (inside & (key >= 0)).to(tl.int32)
    partner = tl.load(memory.ints + shape.at.order + tl.cumsum(left, 0) - 1, mask=left != 0, other=0)
    tl.store(memory.ints + shape.at.partner + gpu, partner, mask=left != 0)
    tl.debug_barrier()


@triton.jit
def _place(memory, shape: tl.constexpr):
    """memory.slot: kept experts in their old slots, the others in the free ones."""
    S: tl.constexpr = shape.slots
    start = 0
    while (
        start < shape.replicas
    ):  # memory.kept: of slots before, then of slots of the plan, as of the GPU that it becomes
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        old = slot // S * S
        new = tl.load(memory.ints + shape.at.partner + slot // S, mask=inside, other=0) * S
        stays = _spare(memory.ints + shape.at.before + old, memory.ints + shape.at.slot + new, slot % S, inside, S)
        wanted = _spare(memory.ints + shape.at.slot + new, memory.ints + shape.at.before + old, slot % S, inside, S)
        tl.store(memory.ints + shape.at.kept + slot, stays, mask=inside)
        tl.store(memory.ints + shape.at.kept + shape.replicas + slot, wanted, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        inside = slot < shape.replicas
        old = slot // S * S
        new = tl.load(memory.ints + shape.at.partner + slot // S, mask=inside, other=0) * S
        nth = tl.zeros((shape.lanes,), tl.int32)  # of its GPU's free slots
        for i in tl.range(0, S):
            kept = tl.load(memory.ints + shape.at.kept + old + i, mask=inside & (i < slot % S), other=1)
            nth += 1 - kept
        expert = tl.load(memory.ints + shape.at.before + slot, mask=inside, other=0)
        free = inside & (tl.load(memory.ints + shape.at.kept + slot, mask=inside, other=1) == 0)
        for j in tl.range(0, S):
            coming = free & (tl.load(memory.ints + shape.at.kept + shape.replicas + old + j, mask=inside, other=1) == 0)
            its_expert = tl.load(memory.ints + shape.at.slot + new + j, mask=coming, other=0)
            expert = tl.where(coming & (nth == 0), its_expert, expert)
            nth -= coming.to(tl.int32)
        tl.store(memory.ints + shape.at.placed + slot, expert, mask=inside)
        start += shape.lanes
    tl.debug_barrier()
    start = 0
    while start < shape.replicas:
        slot = start + tl.arange(0, shape.lanes)
        expert = tl.load(memory.ints + shape.at.placed + slot, mask=slot < shape.replicas, other=0)
        tl.store(memory.ints + shape.at.slot + slot, expert, mask=slot < shape.replicas)
        start += shape.lanes
    tl.debug_barrier()


@triton.jit
def _spare(mine_ptr, theirs_ptr, slot, inside, S: tl.constexpr):
    """Whether the other GPU has a replica for this slot's, after those for the lower slots of its expert: int32."""
    expert = tl.load(mine_ptr + slot, mask=inside, other=-1)
    left = expert * 0
    for i in tl.range(0, S):
        left += (tl.load(theirs_ptr + i, mask=inside, other=-2) == expert).to(tl.int32)
        left -= (tl.load(mine_ptr + i, mask=inside & (i < slot), other=-2) == expert).to(tl.int32)
    return (left > 0).to(tl.int32)
