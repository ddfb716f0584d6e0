"""The kernel of transfers: its PTX run on the CPU, against the reference and without a race, and its estimated time."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from eplb_triton import Topology
from eplb_triton.serving.transfers import COUNTS, list_transfers
from tests.bench.ptx.serving import EXPERTS, Ran, poison, run
from tests.serving.moves import Pair, skewed_pair

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")


def _transfers(pair: Pair) -> Ran:
    layers, replicas = pair.ahead.shape
    given: dict[str, Tensor] = {"ahead_ptr": pair.ahead, "live_ptr": pair.live}
    given |= {"source_ptr": poison(layers, replicas), "batch_ptr": poison(layers, replicas)}
    given |= {"counts_ptr": poison(layers, len(COUNTS))}
    sizes = {"num_experts": pair.experts, "num_replicas": replicas, "num_gpus": pair.topology.num_gpus}
    return run("transfer_layers", list(range(layers)), given, sizes)


def _check_transfers(pair: Pair) -> float:
    """Microseconds of transfers that are the reference's."""
    ran = _transfers(pair)
    want = list_transfers(*pair, backend="reference")
    for name, tensor in zip(("source_ptr", "batch_ptr", "counts_ptr"), want.tensors, strict=True):
        assert torch.equal(ran.found[name], tensor), name
    return ran.microseconds


def _permuted(replicas: int, moved: int, topology: Topology) -> Pair:
    """One layer whose slots, but for the last ones, are dealt anew."""
    live, ahead = (torch.randperm(replicas, generator=torch.Generator().manual_seed(seed)) % EXPERTS for seed in (0, 1))
    ahead[moved:] = live[moved:]
    return Pair(ahead.unsqueeze(0), live.unsqueeze(0), EXPERTS, topology)


def test_transfers_and_their_time() -> None:
    """Steps one after the other: 0.4 µs for every slot that is written."""
    topology = Topology(num_replicas=288, num_gpus=32, num_nodes=4)
    assert 50 < _check_transfers(_permuted(288, 288, topology)) < 150
    assert 1 < _check_transfers(_permuted(288, 16, topology)) < 15


def test_transfers_of_more_batches_than_a_mask_has_bits() -> None:
    _check_transfers(skewed_pair())


@pytest.mark.full
def test_transfers_of_several_warps() -> None:
    _check_transfers(_permuted(1024, 40, Topology(num_replicas=1024, num_gpus=64, num_nodes=8)))
