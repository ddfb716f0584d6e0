"""Splits recorded from two independent readings of the specification."""

from __future__ import annotations

import pytest
import torch

from eplb_triton.serving.dispatch import classify, slots_of, split, table
from tests.backends import CPU_BACKENDS
from tests.serving.shares import golden_shares


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_classes_quotas_and_tables(backend: str) -> None:
    cases = list(golden_shares())
    assert len(cases) == 36
    for case in cases:
        classes = classify(case.phy2log, case.experts, case.topology, backend=backend)
        assert torch.equal(classes[0].long(), case.arrays["classes"]), case.name
        for rounds in (0, 1, 4, 8):
            quotas = split(case.counts, case.phy2log, classes, case.topology, rounds=rounds, backend=backend)
            assert torch.equal(quotas[0].long(), case.arrays[f"quota{rounds}"]), (case.name, rounds)
            if rounds == 4:
                entries = table(quotas, 16, case.phy2log, case.experts, case.topology, backend=backend)
                assert torch.equal(entries[0], case.arrays["table16"]), case.name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_slots(backend: str) -> None:
    cases = [case for case in golden_shares() if "ids" in case.arrays]
    assert len(cases) == 16
    for case in cases:
        ids = case.arrays["ids"]
        counts = torch.stack([torch.bincount(rank[rank >= 0], minlength=case.experts) for rank in ids]).unsqueeze(1)
        classes = classify(case.phy2log, case.experts, case.topology, backend=backend)
        placed = case.phy2log, case.experts, case.topology
        for rank in range(2):
            offsets = torch.full((1, case.experts), -7, dtype=torch.int32)
            quotas = split(counts, case.phy2log, classes, case.topology, rank=rank, offsets=offsets, backend=backend)
            assert torch.equal(quotas[0].long(), case.arrays["quota8"])
            exact = slots_of(ids[rank], 0, quotas, *placed, offsets=offsets, backend=backend)
            assert torch.equal(exact, case.arrays["slots_exact"][rank]), (case.name, rank)
            stacked = quotas.expand(8, -1).contiguous(), case.phy2log.expand(8, -1).contiguous()
            hashed = slots_of(ids[rank].int(), 7, *stacked, *placed[1:], salt=rank, backend=backend)
            assert torch.equal(hashed.long(), case.arrays["slots_hashed"][rank]), (case.name, rank)
