"""Threads: the same bits however many, several calls at once, and nothing half done when one is stopped."""

from __future__ import annotations

import _thread
import inspect
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eplb_triton import POLICIES, Planner, Policy, Topology
from tests.cases import FAMILIES, loads
from tests.sizes import chosen

pytest.importorskip("eplb_triton.cpu", reason="needs the extra: pip install 'eplb-triton[cpu]'", exc_type=ImportError)

from eplb_triton import cpu
from eplb_triton.cpu import launcher, pipeline

SHAPES = [
    (256, Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4)),
    (60, Topology(num_replicas=96, num_gpus=24)),
]


def many_layers(experts: int) -> torch.Tensor:
    """Enough for every thread asked for here to get work, and no multiple of their number."""
    weight = torch.cat([loads(family, 20, 41, experts) for family in FAMILIES])
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(20))]


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize(("experts", "topology"), SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_one_thread_or_many(policy: Policy, experts: int, topology: Topology) -> None:
    weight = many_layers(experts)
    one = cpu.plan_layers(weight, topology, policy, num_threads=1)
    for threads in (2, 3, 8):
        assert same(cpu.plan_layers(weight, topology, policy, num_threads=threads), one)


def test_the_number_of_threads_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(launcher, "_in_spans", lambda work, layers, threads: used.append(threads))
    weight = torch.ones(1000, 256)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cpu.plan_layers(weight, SHAPES[0][1], POLICIES["deepseek"])
    finally:
        torch.set_num_threads(before)
    cpu.plan_layers(weight[:1], SHAPES[0][1], POLICIES["deepseek"], num_threads=64)  # too little to share
    assert used == [1, 3, 1]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_eight_callers_at_once(policy: Policy) -> None:
    experts, topology = SHAPES[0]
    weight = many_layers(experts)[:100]
    want = cpu.plan_layers(weight, topology, policy, num_threads=1)
    together = threading.Barrier(8)

    def call(_: int) -> bool:
        together.wait()
        return all(same(cpu.plan_layers(weight, topology, policy, num_threads=3), want) for _ in range(5))

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(8)))


def test_every_layer_is_in_one_span() -> None:
    for layers, threads in ((1, 1), (2, 2), (5, 2), (58, 3), (1000, 8)):
        seen: list[int] = []

        def work(first: int, last: int, seen: list[int] = seen) -> None:
            seen.extend(range(first, last))

        launcher._in_spans(work, layers, threads)
        assert sorted(seen) == list(range(layers))


@pytest.mark.parametrize("in_caller", [True, False])
def test_an_error_in_any_thread_reaches_the_caller(in_caller: bool) -> None:
    """An interrupt, too: no plan is returned, and no helper is left behind."""
    caller = threading.get_ident()
    helper_came = threading.Event()
    running = threading.active_count()

    def work(first: int, last: int) -> None:
        if threading.get_ident() != caller:
            helper_came.set()
            if not in_caller:
                raise MemoryError("in a helper")
        else:
            assert helper_came.wait(30)
            if in_caller:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if in_caller else MemoryError):
        launcher._in_spans(work, 100, 2)
    assert threading.active_count() == running


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    experts, topology = SHAPES[0]
    weight = many_layers(experts)
    want = cpu.plan_layers(weight, topology, POLICIES["deepseek"], num_threads=1)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    assert same(cpu.plan_layers(weight, topology, POLICIES["deepseek"], num_threads=4), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_plans_too() -> None:
    """Servers fork workers after the parent has planned: threads of the parent are gone there."""
    program = """
import os, torch
from eplb_triton import POLICIES, Topology
from eplb_triton.cpu import plan_layers
topology = Topology(num_replicas=96, num_gpus=8)
call = lambda: plan_layers(torch.ones(200, 64), topology, POLICIES["deepseek"], num_threads=4)
want = call()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(call()[0], want[0]) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize(
    "weight",
    [torch.ones(2, 8, dtype=torch.float64), torch.ones(8), torch.ones(2, 2, 2), torch.ones(2, 8, device="meta")],
    ids=["float64", "1-D", "3-D", "meta"],
)
def test_refuses_what_the_planner_never_passes(weight: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"must be \[L, E\] torch.float32 on cpu"):
        cpu.plan_layers(weight, Topology(num_replicas=16, num_gpus=4), POLICIES["deepseek"])


def test_refuses_no_threads() -> None:
    with pytest.raises(ValueError, match="num_threads=0 must be at least 1"):
        cpu.plan_layers(torch.ones(2, 8), Topology(num_replicas=16, num_gpus=4), POLICIES["deepseek"], num_threads=0)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_no_layers(policy: Policy) -> None:
    phy2log, phyrank, logcnt = cpu.plan_layers(
        torch.ones(0, 8), Topology(num_replicas=16, num_gpus=4, num_groups=4, num_nodes=2), policy
    )
    assert (phy2log.shape, phyrank.shape, logcnt.shape) == ((0, 16), (0, 16), (0, 8))
    assert phy2log.dtype == phyrank.dtype == logcnt.dtype == torch.int64


def test_loads_of_any_strides() -> None:
    wide = loads("continuous", 21, 6, 32)
    got = cpu.plan_layers(wide[:, ::2], Topology(num_replicas=24, num_gpus=4), POLICIES["deepseek"])
    assert same(
        got, cpu.plan_layers(wide[:, ::2].contiguous(), Topology(num_replicas=24, num_gpus=4), POLICIES["deepseek"])
    )


@pytest.mark.parametrize("policy", chosen(POLICIES, "deepseek", "balanced"))
def test_warm_up_leaves_nothing_to_compile(policy: str) -> None:
    experts, topology = SHAPES[0]
    cpu.warm_up(topology, policy)
    caches = pipeline.compiled_rows, pipeline.compiled_mean_length
    before = [cache.cache_info().misses for cache in caches]
    cpu.plan_layers(torch.ones(2, experts), topology, POLICIES[policy])
    assert [cache.cache_info().misses for cache in caches] == before
    with pytest.raises(ValueError, match="is unknown"):
        cpu.warm_up(topology, "no such policy")


def test_warm_up_is_for_what_a_planner_does_by_default() -> None:
    warmed, planned = (inspect.signature(made).parameters["policy"].default for made in (cpu.warm_up, Planner))
    assert warmed == planned
