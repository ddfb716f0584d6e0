"""The small kernel before the fused one, for the two rules of counts with a mean over all rows of the call."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import EPSILON, bits, divide, float64, from_bits, ordered_sum
from eplb_triton.kernels.buffers import ROW_BYTES, replicas_of, statistics_of
from eplb_triton.kernels.replicate import pick_dhondt, pick_sainte_lague
from eplb_triton.kernels.rows import groups_to_nodes, load_row


@triton.jit(do_not_specialize=["loads_ptr", "layer_stride", "expert_stride", "num_rows"])
def measure_rows(
    loads_ptr,  # any real dtype [L, E], tokens per expert
    layer_stride: tl.int64,
    expert_stride: tl.int64,
    num_rows: tl.int32,  # L * N
    scratch_ptr,  # bytes: as of plan_rows; statistics, out
    partitions_ptr,  # int32 [ways, G]
    shape: tl.constexpr,  # Shape
):
    layer = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    row = layer * shape.num_nodes + node
    layer_ptr = loads_ptr + layer * layer_stride
    row_ptr = scratch_ptr + row * (ROW_BYTES * shape.scratch)
    out_ptr = statistics_of(scratch_ptr, num_rows, shape) + row
    groups_to_nodes(layer_ptr, expert_stride, node, row_ptr, partitions_ptr, shape)
    load_row(layer_ptr, expert_stride, row_ptr, None, shape)
    _measure(row_ptr, out_ptr, num_rows, shape)


@triton.jit(noinline=True)
def _measure(row_ptr, out_ptr, num_rows, shape: tl.constexpr):
    experts: tl.constexpr = shape.experts
    replicas = replicas_of(row_ptr, shape)
    if shape.policy.counts == "dispersion":
        tl.store(out_ptr, _variation(replicas.loads, experts.num_experts))
    else:
        _simulate(replicas, out_ptr, num_rows, experts)


@triton.jit
def _variation(loads_ptr, NUM_EXPERTS: tl.constexpr):
    """Coefficient of variation of a row, in float64."""
    mean = ordered_sum(loads_ptr, NUM_EXPERTS) / float64(1.0 * NUM_EXPERTS)
    variance = float64(0.0)
    if NUM_EXPERTS > 1:
        for i in tl.range(0, NUM_EXPERTS, loop_unroll_factor=8):
            deviation = tl.load(loads_ptr + i).to(tl.float64) - mean
            variance += deviation * deviation
        variance = variance / float64(1.0 * (NUM_EXPERTS - 1))
    return tl.sqrt(variance) / tl.maximum(mean, float64(EPSILON))


@triton.jit
def _simulate(replicas, out_ptr, num_rows, shape: tl.constexpr):
    """Peak of the replica loads of a row under each candidate tail length, shortest first.

    The longest tail has the fewest D'Hondt picks, so the candidates are made from last to first on one count."""
    NUM_REDUNDANT: tl.constexpr = shape.num_replicas - shape.num_experts
    FIXED: tl.constexpr = (NUM_REDUNDANT + 9) // 10
    SHORTEST: tl.constexpr = FIXED - 1 if FIXED > 1 else 1
    LONGEST: tl.constexpr = FIXED + 1 if FIXED + 1 < NUM_REDUNDANT else NUM_REDUNDANT
    expert = tl.arange(0, shape.expert_lanes)
    loads = tl.load(replicas.loads + expert, mask=expert < shape.num_experts, other=0.0)
    counts = tl.zeros_like(expert) + 1
    counts = pick_dhondt(replicas, counts, 0, NUM_REDUNDANT - LONGEST, False, True, shape)
    tail = LONGEST
    while tail >= SHORTEST:
        after = pick_sainte_lague(replicas, counts, 0, tail, False, shape)
        peak = tl.max(bits(divide(loads, after)), 0)
        tl.store(out_ptr + (tail - SHORTEST) * num_rows, from_bits(peak).to(tl.float64))
        counts = pick_dhondt(replicas, counts, 0, 1, False, False, shape)
        tail -= 1
