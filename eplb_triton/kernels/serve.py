"""The kernels of a serving step: classes, quotas, slots, tables, counts and transfers; one program a layer, or a chunk
of ids."""
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"

import triton
import triton.language as tl

from eplb_triton.kernels.arith import clean
from eplb_triton.kernels.counting import count_ids, count_slots
from eplb_triton.kernels.places import list_places
from eplb_triton.kernels.routing import exact_slots, fill_table, hashed_slots
from eplb_triton.kernels.splitting import place_classes, split_counts, whole_counts
from eplb_triton.kernels.splitting_levels import SplitScratch
from eplb_triton.kernels.transfers import batch_transfers, choose_sources, count_transfers


@triton.jit
def classify_layers(
    phy2log_ptr,  # integer [L, P]
    scratch_ptr,  # int32 [L, SCRATCH]
    classes_ptr,  # int32 [L, E], out
    shape: tl.constexpr,  # SplitShape
):
    layer = tl.program_id(0).to(tl.int64)
    phy2log_ptr += layer * shape.num_replicas
    number_ptr = scratch_ptr + layer * shape.class_scratch
    expert = tl.arange(0, shape.experts)
    tl.store(number_ptr + expert, tl.zeros_like(expert))
    tl.debug_barrier()
    slot = tl.arange(0, shape.replicas)
    owner = tl.load(phy2log_ptr + slot, mask=slot < shape.num_replicas, other=-1).to(tl.int32)
    tl.atomic_add(number_ptr + owner, 1, mask=owner >= 0, sem="relaxed")
    tl.debug_barrier()
    place_classes(
        phy2log_ptr, None, number_ptr, number_ptr + shape.experts, classes_ptr + layer * shape.num_experts,
        shape.num_experts, shape.num_gpus, shape.slots, shape.experts, shape.gpus,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_layers", "num_ranks", "rank", "rounds"])
def split_layers(
    phy2log_ptr,  # integer [L, P]
    classes_ptr,  # int32 [L, E]
    counts_ptr,  # integer [L, E], tokens; [ranks, L, E] with offsets; or floating [L, E], loads
    offsets_ptr,  # int32 [L, E], out, tokens of the ranks below `rank`; None: not wanted
    scratch_ptr,  # int32 [L, SCRATCH]
    quotas_ptr,  # int32 [L, P], out
    num_layers,
    num_ranks,
    rank,
    rounds,
    shape: tl.constexpr,  # SplitShape
):
    layer = tl.program_id(0).to(tl.int64)
    counts_ptr += layer * shape.num_experts
    expert = tl.arange(0, shape.experts)
    inside = expert < shape.num_experts
    if counts_ptr.dtype.element_ty.is_floating():
        loads, _ = clean(tl.load(counts_ptr + expert, mask=inside, other=0))
        counts, _ = whole_counts(loads, shape.num_experts)
    else:
        counts = tl.load(counts_ptr + expert, mask=inside, other=0).to(tl.int32)
    if offsets_ptr is not None:
        below = tl.where(rank > 0, counts, 0)
        one = 1
        while one < num_ranks:
            counts_ptr += num_layers * shape.num_experts
            more = tl.load(counts_ptr + expert, mask=inside, other=0).to(tl.int32)
            counts += more
            below += tl.where(one < rank, more, 0)
            one += 1
        tl.store(offsets_ptr + layer * shape.num_experts + expert, below, mask=inside)
    E: tl.constexpr = shape.num_experts
    P: tl.constexpr = shape.num_replicas
    own = scratch_ptr + layer * (3 * E + 17 * P)
    after = own + 3 * E
    scratch = SplitScratch(own, own + E, own + 2 * E, after, after + P, after + 2 * P)
    tl.store(scratch.counts + expert, counts, mask=inside)
    split_counts(
        phy2log_ptr + layer * P, classes_ptr + layer * E, scratch.counts, rounds, quotas_ptr + layer * P, scratch, shape
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_ids"])
def count_chunks(
    topk_ids_ptr,  # integer [num_ids]
    counts_ptr,  # int32 [chunks, E], out
    num_ids,
    shape: tl.constexpr,  # SplitShape
    IDS: tl.constexpr,
):
    counts_ptr += tl.program_id(0) * shape.num_experts
    expert = tl.arange(0, shape.experts)
    tl.store(counts_ptr + expert, tl.zeros_like(expert), mask=expert < shape.num_experts)
    tl.debug_barrier()
    index = tl.program_id(0) * IDS + tl.arange(0, IDS)
    ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < shape.num_experts)
    tl.atomic_add(counts_ptr + tl.where(known, ids, 0), 1, mask=known, sem="relaxed")


@triton.jit(do_not_specialize=["num_ids", "layer"])
def route_exactly(
    topk_ids_ptr,  # integer [num_ids]
    phy2log_ptr,  # integer [L, P]
    quotas_ptr,  # int32 [L, P]
    offsets_ptr,  # int32 [L, E]
    counts_ptr,  # int32 [chunks, E], from `count_chunks`
    slots_ptr,  # integer [num_ids], out
    num_ids,
    layer,
    shape: tl.constexpr,  # SplitShape
    IDS: tl.constexpr,
):
    index = tl.program_id(0) * IDS + tl.arange(0, IDS)
    ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1).to(tl.int32)
    places = list_places(phy2log_ptr + layer * shape.num_replicas, quotas_ptr + layer * shape.num_replicas, shape)
    offsets_ptr += layer * shape.num_experts
    slots, lane = exact_slots(ids, offsets_ptr, counts_ptr, tl.program_id(0), places, shape)
    index = tl.program_id(0) * IDS + lane
    tl.store(slots_ptr + index, slots, mask=index < num_ids)


@triton.jit(do_not_specialize=["num_ids", "layer", "salt"])
def route_by_hash(
    topk_ids_ptr,  # integer [num_ids], k a row
    phy2log_ptr,  # integer [L, P]
    quotas_ptr,  # int32 [L, P]
    salt_ptr,  # int32, a salt that may change between replays of a graph; None: `salt`
    slots_ptr,  # integer [num_ids], out
    num_ids,
    layer,
    salt,
    shape: tl.constexpr,  # SplitShape
    IDS: tl.constexpr,
    K: tl.constexpr,
):
    index = tl.program_id(0) * IDS + tl.arange(0, IDS)
    ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1).to(tl.int32)
    places = list_places(phy2log_ptr + layer * shape.num_replicas, quotas_ptr + layer * shape.num_replicas, shape)
    if salt_ptr is not None:
        salt = tl.load(salt_ptr)
    slots = hashed_slots(ids, index // K, layer, salt, places, shape)
    tl.store(slots_ptr + index, slots, mask=index < num_ids)


@triton.jit(do_not_specialize=["width"])
def fill_tables(
    phy2log_ptr,  # integer [L, P]
    quotas_ptr,  # int32 [L, P]
    table_ptr,  # integer [L, E, width], out
    width,
    shape: tl.constexpr,  # SplitShape
):
    layer = tl.program_id(0).to(tl.int64)
    places = list_places(phy2log_ptr + layer * shape.num_replicas, quotas_ptr + layer * shape.num_replicas, shape)
    fill_table(places, width, table_ptr + layer * shape.num_experts * width, shape)


@triton.jit(do_not_specialize=["num_ids", "layer", "num_layers"])
def add_ids(
    topk_ids_ptr,  # integer [num_ids]
    ring_ptr,  # int32 [n, L, E], added to
    position_ptr,  # int64, the step of the ring that is now
    bad_ptr,  # int32, set to 1 where a count leaves int32
    num_ids,
    layer,
    num_layers,
    NUM_EXPERTS: tl.constexpr,
    IDS: tl.constexpr,
):
    index = tl.program_id(0) * IDS + tl.arange(0, IDS)
    ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1).to(tl.int32)
    row = tl.load(position_ptr) * num_layers + layer
    count_ids(ids, ring_ptr + row * NUM_EXPERTS, bad_ptr, NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_layers"])
def add_slots(
    tokens_ptr,  # integer [L, P]
    phy2log_ptr,  # integer [L, P]
    ring_ptr,  # int32 [n, L, E], added to
    position_ptr,  # int64, the step of the ring that is now
    bad_ptr,  # int32, set to 1 where a count leaves int32
    num_layers,
    shape: tl.constexpr,  # SplitShape
):
    layer = tl.program_id(0)
    slot = tl.arange(0, shape.replicas)
    at = layer.to(tl.int64) * shape.num_replicas + slot
    owner = tl.load(phy2log_ptr + at, mask=slot < shape.num_replicas, other=-1)
    tokens = tl.load(tokens_ptr + at, mask=slot < shape.num_replicas, other=0).to(tl.int32)
    row = tl.load(position_ptr) * num_layers + layer
    count_slots(tokens, owner, ring_ptr + row * shape.num_experts, bad_ptr)


@triton.jit
def transfer_layers(
    ahead_ptr,  # integer [L, P]
    live_ptr,  # integer [L, P]
    source_ptr,  # int32 [L, P], out
    batch_ptr,  # int32 [L, P], out
    counts_ptr,  # int32 [L, 5], out
    shape: tl.constexpr,  # SplitShape
    GPUS_PER_NODE: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    row = layer * shape.num_replicas
    choose_sources(ahead_ptr + row, live_ptr + row, GPUS_PER_NODE, source_ptr + row, shape)
    tl.debug_barrier()
    batch_transfers(source_ptr + row, batch_ptr + row, shape)
    tl.debug_barrier()
    count_transfers(source_ptr + row, batch_ptr + row, GPUS_PER_NODE, counts_ptr + layer * 5, shape)
