"""The relabelling kernel as compiled: the contract on five targets; its PTX, run on the CPU, against the reference and
without a race; its estimated time."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import triton
from torch import Tensor

from bench.ptx.compiled import TARGETS, compile_kernel
from bench.ptx.contract import broken_rules
from bench.ptx.machine import FaultError
from bench.ptx.relabelling import compile_relabelling, run_relabelling
from bench.ptx.sass_cycles import GIGAHERTZ, estimate
from eplb_triton import Topology, plan
from eplb_triton.slot_maps import rank_replicas, slots_of_experts
from eplb_triton.synthetic import lognormal_series
from tests.bench.ptx.test_compiled_plans import plant as plant  # noqa: PLC0414 - a fixture
from tests.planting import Planter
from tests.replanning.cases import relabel
from tests.sizes import chosen, full_unless

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

EXPERTS = 256
SHAPES = {
    "v3-hierarchical": Topology(num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32),
    "v3-global": Topology(num_replicas=288, num_gpus=32),
    "144 GPUs": Topology(num_replicas=288, num_gpus=144),
}
MICROSECONDS = {"v3-hierarchical": 15.0, "v3-global": 17.0, "144 GPUs": 50.0}
"""Most that a layer is estimated at; 12.6, 14.3 and 44.3 of the first here."""


def _drawn() -> Tensor:
    """Slots of a layer before and of its plan [2, 1, P]: many the same, GPUs that share nothing, and empty slots."""
    slots = torch.randint(EXPERTS, (2, 1, 288), generator=torch.Generator().manual_seed(0))
    slots[0, :, ::2] = slots[1, :, ::2]
    slots[0, :, 100:200] = -1
    return slots


@pytest.mark.parametrize("target", chosen(TARGETS, "sm_90", "gfx942"))
@pytest.mark.parametrize("shape", [pytest.param(name, marks=full_unless(name == "v3-hierarchical")) for name in SHAPES])
def test_contract(shape: str, target: str) -> None:
    kernel, _ = compile_relabelling(SHAPES[shape], EXPERTS, target, log2phy_width=33)
    assert broken_rules(kernel) == []


@pytest.mark.parametrize("shape", [pytest.param(name, marks=full_unless(name != "v3-global")) for name in SHAPES])
def test_slots_maps_and_time(shape: str) -> None:
    """Of a plan for drifted loads, of one where GPUs have joined, and of drawn slots."""
    topology = SHAPES[shape]
    series = lognormal_series(2, num_layers=2, tokens_per_step=4096, drift=0.05, seed=3)
    old, new = (plan(loads, topology, "balanced", backend="reference").phy2log for loads in series.float())
    old[1, -topology.slots_per_gpu :] = -1
    old, new = (torch.cat(both) for both in zip((old, new), _drawn(), strict=True))
    kernel, size = compile_relabelling(topology, EXPERTS, "sm_90", log2phy_width=33)
    ran = run_relabelling(kernel, size, old, new, want_log2phy=True)
    want = relabel("reference", old, new, topology)
    rank, count = rank_replicas(want, EXPERTS)
    assert torch.equal(ran.maps["phy2log"], want)
    assert torch.equal(ran.maps["phyrank"], rank)
    assert torch.equal(ran.maps["logcnt"], count)
    assert torch.equal(ran.maps["log2phy"], slots_of_experts(want, rank, EXPERTS, 33))
    assert (ran.maps["bad"] == -1).all()
    one = run_relabelling(kernel, size, old[:1], new[:1], want_log2phy=True)
    assert 1 < estimate(kernel, one.machine).cycles / GIGAHERTZ / 1e3 <= MICROSECONDS[shape]


@pytest.mark.parametrize(
    "sound",
    [
        '"""memory.placed becomes memory.slot."""\n    tl.debug_barrier()',
        pytest.param("pack, mask=free)\n    tl.debug_barrier()", marks=full_unless(False)),
        pytest.param("other=0)\n    tl.debug_barrier()\n    tl.store(bad_ptr", marks=full_unless(False)),
    ],
)
def test_sees_a_missing_barrier(sound: str, plant: Planter) -> None:
    plant("relabelling.py", sound, sound.replace("tl.debug_barrier()", "pass"))
    topology = SHAPES["v3-hierarchical"]
    spec, size = import_module("planted_kernels.relabelling_launcher").relabel_spec(topology, EXPERTS)
    old, new = _drawn()
    with pytest.raises(FaultError, match="RaceError"):
        run_relabelling(compile_kernel(spec, "sm_90"), size, old, new, want_log2phy=False)
