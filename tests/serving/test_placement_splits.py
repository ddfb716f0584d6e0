"""A placement splits tokens by itself, and its classes follow its maps."""

from __future__ import annotations

import pytest
import torch

from eplb_triton import POLICIES, Placement, Planner, Topology, plan
from eplb_triton.serving.dispatch import classify
from tests.backends import CPU_BACKENDS
from tests.cases import loads
from tests.comparing import assert_same

TOPOLOGY = Topology(num_replicas=80, num_gpus=16)
LAYERS, EXPERTS = 3, 64


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_classes_are_written_with_the_maps(backend: str, policy: str) -> None:
    planner = Planner(TOPOLOGY, LAYERS, EXPERTS, policy=policy, backend=backend)
    live, ahead = planner.empty(), planner.empty()
    for seed in (1, 2):
        planner(loads("continuous", seed, LAYERS, EXPERTS), out=ahead)
        assert ahead.classes is not None
        assert_same(ahead.classes, classify(ahead.phy2log, EXPERTS, TOPOLOGY, backend="reference"), "classes")
    renumbered = planner(loads("continuous", 3, LAYERS, EXPERTS), previous=ahead)
    assert renumbered.classes is not None
    assert_same(renumbered.classes, classify(renumbered.phy2log, EXPERTS, TOPOLOGY), "classes")
    live.copy_(ahead)
    assert live.classes is not None
    assert ahead.classes is not None
    assert_same(live.classes, ahead.classes, "classes")
    live.phy2log.copy_(Placement.spread_in_order(LAYERS, EXPERTS, TOPOLOGY).phy2log)
    live.refresh()
    assert_same(live.classes, classify(live.phy2log, EXPERTS, TOPOLOGY), "classes")


def test_tokens_are_split_so_that_the_busiest_gpu_has_less() -> None:
    """From counts to slots: every token at a replica of its expert, no GPU busier than with an even split."""
    placement = plan(loads("continuous", 4, LAYERS, EXPERTS), TOPOLOGY)
    tokens = torch.randint(0, EXPERTS, (512, 4), generator=torch.Generator().manual_seed(5)) // 2
    counts = torch.bincount(tokens.flatten(), minlength=EXPERTS).to(torch.int32).repeat(LAYERS, 1)
    quotas = placement.split(counts)
    of_experts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64).scatter_add_(1, placement.phy2log, quotas.long())
    assert_same(of_experts, counts.long(), "tokens of experts")
    on_gpus = quotas.view(LAYERS, 16, -1).sum(2)
    assert (on_gpus.amax(1) <= placement.gpu_loads(counts).amax(1).ceil()).all()
    offsets = torch.zeros(LAYERS, EXPERTS, dtype=torch.int32)
    for layer in range(LAYERS):
        slots = placement.slots_of(tokens, layer, quotas, offsets=offsets)
        assert_same(placement.phy2log[layer][slots], tokens, "expert of each slot")
        assert_same(torch.bincount(slots.flatten(), minlength=80).to(torch.int32), quotas[layer], "tokens of slots")
    table = placement.table(quotas, 16)
    assert table.shape == (LAYERS, EXPERTS, 16)
    assert_same(
        placement.phy2log.gather(1, table.flatten(1)).view_as(table)[..., 0], torch.arange(64).repeat(3, 1), "e"
    )
    for rank in (0, 7):
        held = placement.dispatch_map(rank)
        assert_same(placement.phy2log.gather(1, held), torch.arange(EXPERTS).repeat(LAYERS, 1), "expert of each slot")


def test_a_rank_gets_its_offsets_with_the_quotas() -> None:
    placement = plan(loads("continuous", 4, LAYERS, EXPERTS), TOPOLOGY)
    of_ranks = torch.randint(0, 9, (3, LAYERS, EXPERTS), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    quotas, offsets = (torch.empty(LAYERS, width, dtype=torch.int32) for width in (80, EXPERTS))
    made = placement.split(of_ranks, rank=2, offsets=offsets, out=quotas)
    assert made.data_ptr() == quotas.data_ptr()
    assert_same(offsets, of_ranks[0] + of_ranks[1], "offsets")
    assert_same(quotas, placement.split(of_ranks.sum(0)), "quotas")
    with pytest.raises(ValueError, match=r"rank=None must be 0 to 2 with counts of 3 ranks"):
        placement.split(of_ranks)
