"""The slots of a layer by expert, in registers: a program sorts them anew, so that no table can be stale."""
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST


class Places(NamedTuple):
    """The slots of a layer by expert, then slot, and where each expert's are."""

    key: Any  # int32 [REPLICAS], expert * REPLICAS + slot, ascending; HIGHEST beyond the last
    end: Any  # int32 [REPLICAS], quotas up to and with this slot, modulo 2^32
    first: Any  # int32 [EXPERTS]
    number: Any  # int32 [EXPERTS]
    total: Any  # int32 [EXPERTS], sum of the quotas
    most: Any  # the largest number


@triton.jit
def list_places(phy2log_ptr, quotas_ptr, shape: tl.constexpr):
    """The `Places` of a layer, from phy2log [P] and quotas [P]."""
    lane = tl.arange(0, shape.replicas)
    owner = tl.load(phy2log_ptr + lane, mask=lane < shape.num_replicas, other=-1).to(tl.int32)
    key = tl.sort(tl.where(owner >= 0, owner * shape.replicas + lane, HIGHEST), 0)
    there = key < HIGHEST
    slot = tl.where(there, key % shape.replicas, 0)
    owner = tl.where(there, key // shape.replicas, 0)
    quota = tl.load(quotas_ptr + slot, mask=there, other=0)
    expert = tl.arange(0, shape.experts)
    first = _keys_below(key, expert * shape.replicas, shape.replicas)
    number = _keys_below(key, (expert + 1) * shape.replicas, shape.replicas) - first
    number = tl.where(expert < shape.num_experts, number, 0)
    end = tl.cumsum(quota, 0)
    total = before_each(end, first + number) - before_each(end, first)
    idle = tl.gather(total, owner, 0) == 0
    if tl.max((idle & there).to(tl.int32), 0) > 0:
        last = tl.gather(key, tl.maximum(lane - 1, 0), 0)  # a place, unless the slot before is of its expert and GPU
        again = (
            (lane > 0)
            & (last // shape.replicas == owner)
            & (last % shape.replicas // shape.slots == slot // shape.slots)
        )
        end = tl.cumsum(tl.where(idle & there, 1 - again.to(tl.int32), quota), 0)
        total = before_each(end, first + number) - before_each(end, first)
    return Places(key, end, first, number, total, tl.max(number, 0))


@triton.jit
def _keys_below(key, bound, REPLICAS: tl.constexpr):
    """How many of the ascending keys are below each bound."""
    found = bound * 0
    step = REPLICAS // 2
    while step > 0:
        there = tl.gather(key, found + step - 1, 0) < bound
        found = tl.where(there, found + step, found)
        step = step // 2
    return found + (tl.gather(key, found, 0) < bound).to(tl.int32)


@triton.jit
def before_each(end, position):
    """Sum of the quotas before a position, modulo 2^32."""
    return tl.where(position > 0, tl.gather(end, tl.maximum(position - 1, 0), 0), 0)


@triton.jit
def look_up(ids, nth, places, shape: tl.constexpr):
    """The slot of the nth token of each expert: the first place whose cumulative quota exceeds nth, the last of them
    for one beyond; -1 for an id of no expert, and of an expert without a place."""
    known = (ids >= 0) & (ids < shape.num_experts)
    safe = tl.where(known, ids, 0)
    first = tl.gather(places.first, safe, 0)
    nth = tl.minimum(nth, tl.gather(places.total, safe, 0) - 1)
    base = tl.where(first > 0, tl.gather(places.end, tl.maximum(first - 1, 0), 0), 0)
    at = first
    turn = 1
    while turn < places.most:  # modulo 2^32 the difference is right: it is below 2^31
        at += (tl.gather(places.end, tl.minimum(at, shape.replicas - 1), 0) - base <= nth).to(tl.int32)
        turn += 1
    slot = tl.gather(places.key, tl.minimum(at, shape.replicas - 1), 0) % shape.replicas
    return tl.where(known & (tl.gather(places.number, safe, 0) > 0), slot, -1)
