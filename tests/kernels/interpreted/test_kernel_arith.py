"""Arithmetic that the kernels share, where Triton's own is not what the name says."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from eplb_triton.kernels import arith

pytestmark = pytest.mark.other_triton
NUM = 1 << 16


@triton.jit
def _divide(x_ptr, y_ptr, found_ptr, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    tl.store(found_ptr + at, arith.divide(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@pytest.mark.parametrize("way", ["Triton's", "by float64"])
def test_division_is_correctly_rounded(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any positive float32 numbers, subnormal ones too, by replica counts; half of the quotients next to a tie."""
    monkeypatch.setattr(arith, "DIVIDES_SUBNORMAL", tl.constexpr(way == "Triton's"))
    random = np.random.default_rng(3)
    x = random.integers(1, 0x7F000000, NUM, dtype=np.int32).view(np.float32)
    y = random.integers(1, 1 << 24, NUM, dtype=np.int32)
    x[: NUM // 2] = y[: NUM // 2] * (random.integers(1 << 24, 1 << 25, NUM // 2) + 0.5) * 2.0**-30
    x[NUM // 4 : NUM // 2] *= np.float32(2.0**-120)
    assert (x[NUM // 2 :] < 2.0**-126).any()
    found = torch.empty(NUM, dtype=torch.float32)
    _divide[(1,)](torch.from_numpy(x), torch.from_numpy(y), found, NUM=NUM)
    assert (found.numpy() == x / y.astype(np.float32)).all()
