"""The adapter registered with the stand-in of vLLM, and what its tests call it with."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from eplb_triton import Placement, Topology
from eplb_triton.integrations import vllm
from tests.serving.frameworks import OwnPolicy, fake_vllm

LAYERS, EXPERTS, REPLICAS, RANKS = 2, 8, 12, 3


def registered(monkeypatch: pytest.MonkeyPatch, own: type = OwnPolicy, agree: str = "0", **settings: str) -> Any:
    """The default policy after registration with these settings. AGREE=0: this process is every rank."""
    settings = {"VLLM": "1", "BACKEND": "reference", "AGREE": agree} | settings
    for name, value in settings.items():
        monkeypatch.setenv(f"EPLB_TRITON_{name}", value)
    for name, module in fake_vllm(policy=own).items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    return sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES["default"]


def random_loads(seed: int, experts: int = EXPERTS) -> Tensor:
    return torch.randint(1, 1000, (LAYERS, experts), generator=torch.Generator().manual_seed(seed))


def in_order(replicas: int = REPLICAS, experts: int = EXPERTS) -> Tensor:
    return (torch.arange(replicas) % experts).repeat(LAYERS, 1)


def check_valid(phy2log: Tensor, experts: int = EXPERTS, ranks: int = RANKS) -> None:
    assert phy2log.dtype == torch.int64
    topology = Topology(num_replicas=phy2log.shape[1], num_gpus=ranks)
    Placement.from_phy2log(phy2log, experts, topology).validate()
    for row in phy2log.tolist():
        assert set(row) == set(range(experts))
