"""LoadWindow: what was counted, in which step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from eplb_triton.serving.window import LoadWindow


def test_a_ring_keeps_the_last_steps_oldest_first() -> None:
    window = LoadWindow(3, 2, 5)
    seen = []
    for step in range(7):
        ids = torch.randint(-1, 6, (20, 2), generator=torch.Generator().manual_seed(step))  # 5 is no expert
        window.add(1, ids)
        window.add(1, ids[:3].int())
        both = torch.cat((ids, ids[:3])).flatten()
        seen.append(torch.bincount(both[(both >= 0) & (both < 5)], minlength=5))
        history = window.history
        assert (history.dtype, tuple(history.shape)) == (torch.int32, (3, 2, 5))
        for back in range(3):
            want = seen[-1 - back] if back < len(seen) else torch.zeros(5)
            assert torch.equal(history[2 - back, 1].long(), want.long())
        assert torch.equal(window.loads[1], sum(seen[-3:], torch.zeros(5, dtype=torch.int64)))
        assert (history[:, 0] == 0).all()
        window.advance()
    assert (window.history[2] == 0).all()
    window.raise_if_bad()


def test_counts_of_slots_go_to_their_experts() -> None:
    window = LoadWindow(2, 2, 3)
    placement = SimpleNamespace(phy2log=torch.tensor([[0, 1, 0, -1], [2, 2, 1, 0]]))
    window.add_counts(torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), placement)
    window.add_counts(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32), placement)
    assert window.history[1].tolist() == [[13, 6, 0], [4, 3, 3]]
    with pytest.raises(ValueError, match=r"counts\[0, 0\]=-1"):
        window.add_counts(-torch.ones(2, 4, dtype=torch.int64), placement)


def test_an_overflow_is_told() -> None:
    window = LoadWindow(2, 1, 2)
    placement = SimpleNamespace(phy2log=torch.tensor([[0, 1]]))
    window.add_counts(torch.tensor([[2**31 - 1, 0]]), placement)
    with pytest.raises(OverflowError, match="more than 2147483647 tokens"):
        window.add(0, torch.tensor([[0]]))
    with pytest.raises(OverflowError):
        window.raise_if_bad()
    assert int(window.loads[0, 0]) == 2**31 - 1
    window.advance()
    window.add(0, torch.tensor([[0]]))
    assert int(window.loads[0, 0]) == 2**31  # sums are wider


def test_reduce_sums_over_ranks(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        window = LoadWindow(2, 1, 3)
        window.add(0, torch.tensor([[0, 2]]))
        reduced = window.reduce()
    finally:
        distributed.destroy_process_group()
    assert reduced.dtype == torch.int64
    assert reduced.tolist() == [[[0, 0, 0]], [[1, 0, 1]]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        LoadWindow(0, 1, 1)
    window = LoadWindow(1, 1, 1)
    with pytest.raises(ValueError, match="layer=1 must be 0 to 0"):
        window.add(1, torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"topk_ids has dtype torch\.int16"):
        window.add(0, torch.zeros(1, 1, dtype=torch.int16))
