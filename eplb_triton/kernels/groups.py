"""The loads of a row: groups to nodes, then the experts of a node's groups. A row is a layer, or one node of it."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import HIGHEST, clean
from eplb_triton.kernels.fixed import fixed_point
from eplb_triton.kernels.groups_partition import pack_partition
from eplb_triton.kernels.pack import pack_plain
from eplb_triton.kernels.refine import refine_corner, refine_nearest


@triton.jit
def groups_to_nodes(
    layer_ptr,  # any real dtype [NUM_EXPERTS], tokens per expert of the layer
    expert_stride,
    node,
    logical_ptr,  # int32 [NUM_EXPERTS / NUM_NODES], out: logical expert of each expert of the row
    loads_ptr,  # float32 [NUM_GROUPS], scratch
    item_at_ptr,  # int32 [NUM_GROUPS], scratch
    sorted_ptr,  # int64 [NUM_GROUPS + 40], scratch
    held_ptr,  # float64 [NUM_NODES], scratch
    table_ptr,  # int32 [WAYS, NUM_GROUPS], of pack_partition
    fixed_ptr,  # int32 [NUM_GROUPS], scratch
    state_ptr,  # int32 [5, GROUPS], scratch
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    NODES: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    LIGHTS: tl.constexpr,
    PACK: tl.constexpr,
    WANT_NODES: tl.constexpr,
    WAYS: tl.constexpr,
    WAY_LANES: tl.constexpr,
    PROPOSERS: tl.constexpr,
    MEETINGS: tl.constexpr,
):
    """A row's experts are its groups in position order, each group's experts in index order. Returns the load of the
    layer's heaviest node in fixed point and its scale, where they are wanted."""
    SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    e: tl.constexpr = NUM_EXPERTS // NUM_NODES
    expert = tl.arange(0, EXPERTS)
    heaviest = tl.full((), 0, tl.int32)
    scale = tl.full((), 0, tl.int64)
    if NUM_GROUPS == NUM_NODES and not WANT_NODES:  # group i on node i
        tl.store(logical_ptr + expert, node * e + expert, mask=expert < e)
    else:
        group = tl.arange(0, GROUPS)
        inside = group < NUM_GROUPS
        total = tl.zeros((GROUPS,), tl.float64)
        for i in tl.range(0, SIZE, loop_unroll_factor=8):
            raw = tl.load(layer_ptr + (group * SIZE + i).to(tl.int64) * expert_stride, mask=inside, other=0)
            load, _ = clean(raw)
            total += load.to(tl.float64)
        tl.store(loads_ptr + group, total.to(tl.float32), mask=inside)
        tl.debug_barrier()
        if PACK == "partition":
            heaviest, scale = pack_partition(
                loads_ptr, item_at_ptr, table_ptr, fixed_ptr, state_ptr, sorted_ptr,
                NUM_GROUPS, NUM_NODES, GROUPS, NODES, WAYS, WAY_LANES, PROPOSERS, MEETINGS,
            )  # fmt: skip
        else:
            pack_plain(loads_ptr, item_at_ptr, sorted_ptr, NUM_GROUPS, NUM_NODES, GROUPS, NODES, NODES > 32)
        if RULE == "nearest":
            refine_nearest(loads_ptr, item_at_ptr, NUM_NODES, STEPS, LIGHTS, NUM_GROUPS, NODES)
        if RULE == "corner":
            refine_corner(loads_ptr, item_at_ptr, held_ptr, NUM_NODES, STEPS, NUM_GROUPS, NODES, GROUP_SLOTS)
        tl.debug_barrier()
        if WANT_NODES and (PACK != "partition" or RULE != "none"):
            heaviest, scale = _heaviest_node(loads_ptr, item_at_ptr, fixed_ptr, NUM_GROUPS, NUM_NODES, GROUPS, NODES)
        position = node * (NUM_GROUPS // NUM_NODES) + expert // SIZE
        its_group = tl.load(item_at_ptr + position, mask=expert < e, other=0)
        tl.store(logical_ptr + expert, its_group * SIZE + expert % SIZE, mask=expert < e)
    tl.debug_barrier()
    return heaviest, scale


@triton.jit
def _heaviest_node(
    loads_ptr,
    item_at_ptr,
    fixed_ptr,
    NUM_GROUPS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    NODES: tl.constexpr,
):
    """Load of the heaviest node in the fixed point of the groups, and its scale."""
    S: tl.constexpr = NUM_GROUPS // NUM_NODES
    scale = fixed_point(loads_ptr, fixed_ptr, S, NUM_GROUPS, GROUPS)
    node = tl.arange(0, NODES)
    total = tl.zeros((NODES,), tl.int32)
    for k in tl.range(0, S):
        group = tl.load(item_at_ptr + node * S + k, mask=node < NUM_NODES, other=0)
        total += tl.load(fixed_ptr + group, mask=node < NUM_NODES, other=0)
    return tl.max(total, 0), scale


@triton.jit
def load_row(
    layer_ptr,
    expert_stride,
    logical_ptr,
    weights_ptr,  # float32 [NUM], out: cleaned loads of the row
    bad_ptr,  # int32, out: lowest logical expert of the row with a bad load, else -1; None: not wanted
    NUM: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Loads that are NaN, negative or above 2^100 count as 0 from here on."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < NUM
    logical = tl.load(logical_ptr + expert, mask=inside, other=0)
    load, bad = clean(tl.load(layer_ptr + logical.to(tl.int64) * expert_stride, mask=inside, other=0))
    tl.store(weights_ptr + expert, load, mask=inside)
    if bad_ptr is not None:
        first = tl.min(tl.where(bad & inside, logical, HIGHEST), 0)
        tl.store(bad_ptr, tl.where(first < HIGHEST, first, -1))
    tl.debug_barrier()
