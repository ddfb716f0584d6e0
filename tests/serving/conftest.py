"""What the tests of the adapter for vLLM start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eplb_triton.integrations import vllm
from eplb_triton.integrations.replanner import Replanner
from tests.serving.frameworks import OwnPolicy


@pytest.fixture
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test registers anew; the adapter logs where pytest hears it."""
    for name in ("EPLB_TRITON_VLLM", "EPLB_TRITON_SGLANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(OwnPolicy, "fails", False)
    monkeypatch.setattr(Replanner, "_backends", lambda *_: ["reference"])  # a planted fault compiles no other
    yield
    vllm.TritonEplbPolicy.weighted = None
