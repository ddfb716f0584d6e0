"""The small kernel before the fused one, for the two tail rules with a mean over all rows of the call."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import bits, divide, float64, from_bits, ordered_sum
from eplb_triton.kernels.groups import groups_to_nodes, load_row
from eplb_triton.kernels.replicate import pick_dhondt, pick_sainte_lague


@triton.jit(do_not_specialize=["layer_stride", "num_rows"])
def measure_rows(
    weight_ptr,  # any real dtype [L, E], tokens per expert
    layer_stride,
    expert_stride,
    num_rows,  # L * N
    statistics_ptr,  # float64 [3, L * N], out
    floats_ptr,  # float32 [L * N, 3, SCRATCH], scratch, as all below
    ints_ptr,  # int32 [L * N, 12, SCRATCH]
    longs_ptr,  # int64 [L * N, SCRATCH]
    doubles_ptr,  # float64 [L * N, SCRATCH]
    partitions_ptr,  # int32 [WAYS, G]
    NUM_EXPERTS: tl.constexpr,
    NUM_REPLICAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    NODES: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    SCRATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP_RULE: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    GROUP_LIGHTS: tl.constexpr,
    GROUP_PACK: tl.constexpr,
    WAYS: tl.constexpr,
    WAY_LANES: tl.constexpr,
    GROUP_PROPOSERS: tl.constexpr,
    GROUP_MEETINGS: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    row = layer * NUM_NODES + node
    e: tl.constexpr = NUM_EXPERTS // NUM_NODES
    weights_ptr = floats_ptr + row * (3 * SCRATCH)
    logical_ptr = ints_ptr + row * (12 * SCRATCH)
    groups_to_nodes(
        weight_ptr + layer * layer_stride,
        expert_stride,
        node,
        logical_ptr,
        weights_ptr + SCRATCH,
        logical_ptr + SCRATCH,
        longs_ptr + row * SCRATCH,
        doubles_ptr + row * SCRATCH,
        partitions_ptr,
        logical_ptr + 6 * SCRATCH,
        logical_ptr + 7 * SCRATCH,
        NUM_EXPERTS,
        NUM_GROUPS,
        NUM_NODES,
        EXPERTS,
        GROUPS,
        NODES,
        GROUP_SLOTS,
        GROUP_RULE,
        GROUP_STEPS,
        GROUP_LIGHTS,
        GROUP_PACK,
        False,
        WAYS,
        WAY_LANES,
        GROUP_PROPOSERS,
        GROUP_MEETINGS,
    )
    load_row(weight_ptr + layer * layer_stride, expert_stride, logical_ptr, weights_ptr, None, e, EXPERTS)
    if TAIL == "dispersion":
        tl.store(statistics_ptr + row, _variation(weights_ptr, e))
    else:
        NUM_REDUNDANT: tl.constexpr = NUM_REPLICAS // NUM_NODES - e
        _simulate(weights_ptr, statistics_ptr + row, num_rows, NUM_REDUNDANT, e, EXPERTS, AT_ONCE)


@triton.jit
def _variation(weights_ptr, NUM_EXPERTS: tl.constexpr):
    """Coefficient of variation of a row, in float64."""
    mean = ordered_sum(weights_ptr, NUM_EXPERTS) / float64(1.0 * NUM_EXPERTS)
    variance = float64(0.0)
    if NUM_EXPERTS > 1:
        for i in tl.range(0, NUM_EXPERTS, loop_unroll_factor=8):
            deviation = tl.load(weights_ptr + i).to(tl.float64) - mean
            variance += deviation * deviation
        variance = variance / float64(1.0 * (NUM_EXPERTS - 1))
    return tl.sqrt(variance) / tl.maximum(mean, float64(1e-12))


@triton.jit
def _simulate(
    weights_ptr,
    out_ptr,
    num_rows,
    NUM_REDUNDANT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Peak w / c of a row under each candidate tail length, shortest first.

    The longest tail has the fewest D'Hondt picks, so the candidates are made from last to first on one count."""
    FIXED: tl.constexpr = (NUM_REDUNDANT + 9) // 10
    SHORTEST: tl.constexpr = FIXED - 1 if FIXED > 1 else 1
    LONGEST: tl.constexpr = FIXED + 1 if FIXED + 1 < NUM_REDUNDANT else NUM_REDUNDANT
    expert = tl.arange(0, EXPERTS)
    inside = expert < NUM_EXPERTS
    weights = tl.load(weights_ptr + expert, mask=inside, other=0.0)
    counts = tl.zeros((EXPERTS,), tl.int32) + 1
    bulk_ptr = weights_ptr if AT_ONCE else None  # no list is made, so the scratch is not used
    counts = pick_dhondt(weights_ptr, counts, None, None, 0, NUM_REDUNDANT - LONGEST, bulk_ptr, NUM_EXPERTS, EXPERTS, 1)
    tail = LONGEST
    while tail >= SHORTEST:
        after = pick_sainte_lague(weights_ptr, counts, None, None, 0, tail, NUM_EXPERTS, EXPERTS)
        peak = tl.max(bits(divide(weights, after)), 0)
        tl.store(out_ptr + (tail - SHORTEST) * num_rows, from_bits(peak).to(tl.float64))
        counts = pick_dhondt(weights_ptr, counts, None, None, 0, 1, None, NUM_EXPERTS, EXPERTS, 1)
        tail -= 1
