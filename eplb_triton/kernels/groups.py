"""Groups: their loads, and the experts and loads of the nodes that they are packed onto."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import clean
from eplb_triton.kernels.fixed import fixed_point


@triton.jit
def group_loads(
    layer_ptr,  # any real dtype [num_experts], tokens per expert of the layer
    expert_stride,
    loads_ptr,  # float32 [num_groups], out
    SIZE: tl.constexpr,  # experts of a group
    shape: tl.constexpr,  # Packing
):
    """Each group's experts summed in float64, rounded once."""
    group = tl.arange(0, shape.item_lanes)
    inside = group < shape.num_items
    total = tl.zeros_like(group).to(tl.float64)
    for i in tl.range(0, SIZE, loop_unroll_factor=8):
        raw = tl.load(layer_ptr + (group * SIZE + i).to(tl.int64) * expert_stride, mask=inside, other=0)
        load, _ = clean(raw)
        total += load.to(tl.float64)
    tl.store(loads_ptr + group, total.to(tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit
def list_experts(
    item_at_ptr,  # int32 [num_groups], group at each place
    node,
    logical_ptr,  # int32 [num_experts / num_nodes], out: logical expert of each expert of the row
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,  # lanes
    shape: tl.constexpr,  # Packing
):
    """A row's experts are its groups in position order, each group's experts in index order."""
    S: tl.constexpr = shape.num_items // shape.num_packs
    expert = tl.arange(0, EXPERTS)
    its_group = tl.load(item_at_ptr + node * S + expert // SIZE, mask=expert < S * SIZE, other=0)
    tl.store(logical_ptr + expert, its_group * SIZE + expert % SIZE, mask=expert < S * SIZE)
    tl.debug_barrier()


@triton.jit
def node_loads(items, shape: tl.constexpr):
    """Load [pack_lanes] int32 of each node in the fixed point of the groups, and its scale, int64."""
    S: tl.constexpr = shape.num_items // shape.num_packs
    scale = fixed_point(items.loads, items.fixed, shape)
    node = tl.arange(0, shape.pack_lanes)
    total = tl.zeros_like(node)
    for k in tl.range(0, S):
        group = tl.load(items.item_at + node * S + k, mask=node < shape.num_packs, other=0)
        total += tl.load(items.fixed + group, mask=node < shape.num_packs, other=0)
    return total, scale
