"""Fixed point: loads as int32 on a scale of their row, so that sums are exact in any order."""
# ruff: noqa: N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton import constants
from eplb_triton.kernels.arith import bits, float64, from_bits

LOAD_BITS = tl.constexpr(constants.LOAD_BITS)
FULL = tl.constexpr(2.0**constants.LOAD_BITS)
INDEX = tl.constexpr(0xFFFF)  # of an item or a label, in a sort key: load, then label, then item
LABEL_SHIFT = tl.constexpr(16)
PENALTY = tl.constexpr(constants.PENALTY)  # above every load


@triton.jit
def fixed_point(
    loads_ptr,  # float32 [NUM_ITEMS]
    fixed_ptr,  # int32 [NUM_ITEMS], out
    shape: tl.constexpr,  # Packing
):
    """Cut each load times 2^scale to an integer, so that a full pack stays below 2^28; the scale, int64."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    CAPACITY: tl.constexpr = NUM_ITEMS // shape.num_packs
    item = tl.arange(0, shape.item_lanes)
    load = tl.load(loads_ptr + item, mask=item < NUM_ITEMS, other=0.0)
    heaviest = from_bits(tl.max(bits(load), 0)).to(tl.float64)
    exponent = (heaviest.to(tl.int64, bitcast=True) >> 52) - 1022
    scale = -exponent + LOAD_BITS
    width = 1
    while width < CAPACITY:
        width += width
        scale -= 1
    scale = tl.where(heaviest == 0, 0, scale)
    tl.store(fixed_ptr + item, (load.to(tl.float64) * power_of_two(scale)).to(tl.int32), mask=item < NUM_ITEMS)
    tl.debug_barrier()
    return scale


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64, of an int64 exponent from -1022 to 1023."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def mean_target(fixed_ptr, shape: tl.constexpr):
    """The mean pack load, rounded up, int32. No pack need be lighter."""
    NUM_ITEMS: tl.constexpr = shape.num_items
    NUM_PACKS: tl.constexpr = shape.num_packs
    item = tl.arange(0, shape.item_lanes)
    total = tl.sum(tl.load(fixed_ptr + item, mask=item < NUM_ITEMS, other=0).to(tl.int64), 0)
    return ((total + (NUM_PACKS - 1)) // NUM_PACKS).to(tl.int32)


@triton.jit
def node_target(
    heaviest_node,  # int32, load of the layer's heaviest node in the fixed point of its groups
    node_scale,
    fixed_ptr,
    scale,
    shape: tl.constexpr,
):
    """The mean GPU load of the layer's heaviest node on the scale of the row, or the row's own if larger."""
    NUM_PACKS: tl.constexpr = shape.num_packs
    of_layer = heaviest_node.to(tl.float64) * power_of_two(scale - node_scale)
    of_layer = tl.minimum(of_layer / float64(NUM_PACKS), float64(FULL)).to(tl.int32)
    return tl.maximum(of_layer, mean_target(fixed_ptr, shape))


@triton.jit
def label_of(key):
    """The label of a sort key."""
    return ((key >> LABEL_SHIFT) & INDEX).to(tl.int32) ^ INDEX
