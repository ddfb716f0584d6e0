"""The operator: what PyTorch asks of one, and the plan it gives inside a compiled function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eplb_triton import POLICIES, rebalance_experts
from eplb_triton.ops import rebalance
from tests.cases import loads
from tests.comparing import assert_each_same, assert_same

COUNTS = (16, 4, 2, 8)


@pytest.mark.parametrize("policy", POLICIES)
def test_opcheck(policy: str) -> None:
    torch.library.opcheck(rebalance, (loads("continuous", 1, 3, 12), *COUNTS, policy))


def test_opcheck_of_odd_inputs() -> None:
    torch.library.opcheck(rebalance, (torch.arange(24).view(12, 2).T, *COUNTS))
    torch.library.opcheck(rebalance, (torch.empty(0, 12), *COUNTS))


def test_gives_the_plan() -> None:
    """DeepSeek's where no policy is named, as `rebalance_experts`."""
    weight = loads("continuous", 2, 3, 12)
    assert_same(rebalance(weight, *COUNTS)[0], rebalance(weight, *COUNTS, "deepseek")[0], "phy2log")
    got = torch.ops.eplb_triton.rebalance(weight, *COUNTS)
    assert_each_same(got, rebalance_experts(weight, *COUNTS), "phy2log", "log2phy", "logcnt")


def test_compiles_without_a_graph_break() -> None:
    def hot_slots(weight: Tensor) -> Tensor:
        phy2log, _, logcnt = rebalance(weight * 2, *COUNTS, "hybrid_tail_waterfill")
        return torch.gather(weight / logcnt, 1, phy2log)

    weight = loads("continuous", 3, 3, 12)
    compiled = torch.compile(hot_slots, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), hot_slots(weight))
    assert torch.equal(compiled(weight.flip(0)), hot_slots(weight.flip(0)))


def test_refuses_at_trace_time() -> None:
    compiled = torch.compile(
        lambda weight: rebalance(weight, 16, 4, 2, 7), fullgraph=True, backend="aot_eager", dynamic=False
    )
    with pytest.raises(Exception, match="num_replicas=16 must be a multiple of num_gpus=7"):
        compiled(loads("continuous", 4, 3, 12))
    with pytest.raises(ValueError, match="must be 2-D"):
        rebalance(torch.ones(12), *COUNTS)
