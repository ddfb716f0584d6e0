"""The kernels of a serving step as machine code: the contract on five targets; their PTX run on the CPU, against the
reference and without a race; their estimated time. DeepSeek-V3's size, 32 GPUs."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor

from bench.ptx.compiled import TARGETS
from bench.ptx.contract import broken_rules
from bench.ptx.serving import TYPES
from eplb_triton import Topology, plan
from eplb_triton.kernels.arith import triton_version
from eplb_triton.kernels.serve_launch import HASHED_IDS, IDS, split_shape
from eplb_triton.serving.dispatch import classify, slots_of, split, table
from eplb_triton.synthetic import lognormal_series
from tests.bench.ptx.serving import EXPERTS, INT32, INT64, TOKENS, K, compiled, poison, run
from tests.serving.shares import golden_shares
from tests.sizes import chosen, full_unless

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

TOPOLOGY = Topology(num_replicas=288, num_gpus=32)


class Step(NamedTuple):
    """Two layers of a step on two ranks; this rank is the second."""

    phy2log: Tensor
    classes: Tensor
    ids: Tensor  # [TOKENS, K], of layer 1
    counts: Tensor  # [ranks, L, E]
    offsets: Tensor
    quotas: Tensor


@cache
def _step() -> Step:
    series = lognormal_series(2, num_layers=2, tokens_per_step=TOKENS)
    phy2log = plan(series[0], TOPOLOGY, backend="reference").phy2log
    chances = series[1, 1].double() / series[1, 1].sum()
    ids = torch.multinomial(chances.expand(TOKENS, -1), K, generator=torch.Generator().manual_seed(0)).int()
    own = series[1].int()
    own[1] = torch.bincount(ids.flatten(), minlength=EXPERTS)
    counts = torch.stack((series[1].int(), own))
    classes = classify(phy2log, EXPERTS, TOPOLOGY, backend="reference")
    offsets = torch.empty(2, EXPERTS, dtype=INT32)
    quotas = split(counts, phy2log, classes, TOPOLOGY, rank=1, offsets=offsets, backend="reference")
    return Step(phy2log, classes, ids, counts, offsets, quotas)


@pytest.mark.parametrize("target", chosen(TARGETS, "sm_90", "gfx942"))
@pytest.mark.parametrize("name", TYPES)
def test_contract(name: str, target: str) -> None:
    assert broken_rules(compiled(name, target, TYPES[name])) == []


@pytest.mark.parametrize("target", [pytest.param(t, marks=full_unless(t == "sm_90")) for t in TARGETS])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("split_layers", {"counts_ptr": torch.float32, "offsets_ptr": None}),
        ("fill_tables", {}),
        ("transfer_layers", {}),
    ],
)
@pytest.mark.parametrize("sizes", [(256, 288, 144), (1024, 2048, 256)])
def test_contract_of_large_placements(
    name: str, change: dict[str, torch.dtype | None], sizes: tuple[int, int, int], target: str
) -> None:
    experts, replicas, gpus = sizes
    wide = {"num_experts": experts, "num_replicas": replicas, "num_gpus": gpus}
    assert broken_rules(compiled(name, target, TYPES[name] | change, **wide)) == []


def test_classes() -> None:
    step = _step()
    scratch = split_shape(EXPERTS, 288, 32, lanes=32).class_scratch
    given = {"phy2log_ptr": step.phy2log, "scratch_ptr": poison(2, scratch), "classes_ptr": poison(2, EXPERTS)}
    ran = run("classify_layers", [0, 1], given)
    assert torch.equal(ran.found["classes_ptr"], step.classes)
    assert 1 < ran.microseconds < 12


def test_split_and_its_time() -> None:
    """One layer alone, and so all at once: 58 programs fit on an H100 side by side. What Triton 3.6 and 3.8 make of it
    takes 13.4 and 13.3 microseconds, by the same estimate."""
    step = _step()
    given = {
        "phy2log_ptr": step.phy2log,
        "classes_ptr": step.classes,
        "counts_ptr": step.counts,
        "offsets_ptr": poison(2, EXPERTS),
        "scratch_ptr": poison(2, 3 * EXPERTS + 17 * 288),
        "quotas_ptr": poison(2, 288),
    }
    ran = run("split_layers", [0, 1], given, num_layers=2, num_ranks=2, rank=1, rounds=8)
    assert torch.equal(ran.found["quotas_ptr"], step.quotas)
    assert torch.equal(ran.found["offsets_ptr"], step.offsets)
    assert 1 < ran.microseconds <= (12 if triton_version() >= (3, 9) else 14)


@pytest.mark.parametrize("name", [pytest.param(name, marks=full_unless(name == "8")) for name in ("6", "8", "9", "10")])
def test_split_of_recorded_placements(name: str) -> None:
    """Also where GPUs are spread over warps: 9 GPUs, dozens of replicas; 144; 64; one replica an expert."""
    case = next(case for case in golden_shares() if case.name == name)
    replicas = case.topology.num_replicas
    given = {
        "phy2log_ptr": case.phy2log,
        "classes_ptr": case.arrays["classes"].int().unsqueeze(0),
        "counts_ptr": case.counts,
        "offsets_ptr": None,
        "scratch_ptr": poison(1, 3 * case.experts + 17 * replicas),
        "quotas_ptr": poison(1, replicas),
    }
    sizes = {"num_experts": case.experts, "num_replicas": replicas, "num_gpus": case.topology.num_gpus}
    ran = run("split_layers", [0], given, sizes, num_layers=1, num_ranks=1, rank=0, rounds=8)
    assert torch.equal(ran.found["quotas_ptr"][0].long(), case.arrays["quota8"])


def test_slots_by_counting_and_their_time() -> None:
    step, chunks = _step(), TOKENS * K // IDS
    counted = torch.stack(
        [torch.bincount(ids, minlength=EXPERTS) for ids in torch.split(step.ids.flatten(), IDS)]
    ).int()
    ids = {"topk_ids_ptr": step.ids}
    first = run("count_chunks", [0, chunks - 1], ids | {"counts_ptr": poison(chunks, EXPERTS)}, num_ids=TOKENS * K)
    assert torch.equal(first.found["counts_ptr"][[0, -1]], counted[[0, -1]])
    placed = {"phy2log_ptr": step.phy2log, "quotas_ptr": step.quotas, "offsets_ptr": step.offsets}
    given = ids | placed | {"counts_ptr": counted, "slots_ptr": poison(TOKENS, K)}
    second = run("route_exactly", [0, chunks - 1], given, num_ids=TOKENS * K, layer=1)
    want = slots_of(
        step.ids, 1, step.quotas, step.phy2log, EXPERTS, TOPOLOGY, offsets=step.offsets, backend="reference"
    )
    for chunk in (slice(0, IDS), slice(-IDS, None)):
        assert torch.equal(second.found["slots_ptr"].flatten()[chunk], want.flatten()[chunk])
    assert 1 < first.microseconds + second.microseconds <= 20


def test_slots_by_hash_and_their_time() -> None:
    step = _step()
    given = {
        "topk_ids_ptr": step.ids,
        "phy2log_ptr": step.phy2log,
        "quotas_ptr": step.quotas,
        "salt_ptr": None,
        "slots_ptr": poison(TOKENS, K),
    }
    ran = run("route_by_hash", [3], given, num_ids=TOKENS * K, layer=1, salt=-77)
    want = slots_of(step.ids, 1, step.quotas, step.phy2log, EXPERTS, TOPOLOGY, salt=-77, backend="reference")
    chunk = slice(3 * HASHED_IDS, 4 * HASHED_IDS)
    assert torch.equal(ran.found["slots_ptr"].flatten()[chunk], want.flatten()[chunk])
    assert 1 < ran.microseconds <= 5


def test_tables() -> None:
    step = _step()
    entries = {"table_ptr": poison(2, EXPERTS, 16, dtype=INT64)}
    ran = run("fill_tables", [1], {"phy2log_ptr": step.phy2log, "quotas_ptr": step.quotas} | entries, width=16)
    want = table(step.quotas, 16, step.phy2log, EXPERTS, TOPOLOGY, backend="reference")
    assert torch.equal(ran.found["table_ptr"][1], want[1])


def test_window_and_its_time() -> None:
    step = _step()
    window = {"ring_ptr": torch.zeros(4, 2, EXPERTS, dtype=INT32), "position_ptr": torch.tensor([2])}
    window |= {"bad_ptr": torch.zeros(1, dtype=INT32)}
    ran = run("add_ids", [1], {"topk_ids_ptr": step.ids} | window, num_ids=TOKENS * K, layer=1, num_layers=2)
    want = torch.zeros(4, 2, EXPERTS, dtype=INT32)
    want[2, 1] = torch.bincount(step.ids.flatten()[HASHED_IDS : 2 * HASHED_IDS], minlength=EXPERTS)
    assert torch.equal(ran.found["ring_ptr"], want)
    assert int(ran.found["bad_ptr"]) == 0
    assert ran.microseconds <= 5
    full = window | {"ring_ptr": torch.full((4, 2, EXPERTS), 2**31 - 1, dtype=INT32)}
    tokens = torch.ones(2, 288, dtype=INT32)
    ran = run("add_slots", [0], {"tokens_ptr": tokens, "phy2log_ptr": step.phy2log} | full, num_layers=2)
    assert int(ran.found["bad_ptr"]) == 1
