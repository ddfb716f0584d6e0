"""Host time of an eager launch, and that of a Planner, without a GPU: everything but the driver's own launch.

    python -m bench.studies.launch_time [--policies deepseek,balanced] [--calls 20000]

Triton's driver is replaced by one that compiles for sm_90, takes every argument's address as the real one does, and
launches nothing; loads and maps lie in the memory of the CPU. Prints microseconds of CPU a call: the median over
chunks of 100 calls.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from eplb_triton import POLICIES, Planner
from eplb_triton.kernels import fused, launcher, measure, relabelling, replanning, serve, steps
from eplb_triton.kernels.launcher import Launch
from eplb_triton.testing.models import MODELS

CHUNK = 100
V3 = MODELS["v3-hierarchical"]


class NoDriver:
    """What Triton asks of a driver. `launched`: name of each kernel with its grid and arguments, if kept."""

    def __init__(self, *, keep: bool = False) -> None:
        self.launched: list[tuple[str, tuple[int, int, int], tuple[Any, ...]]] = []
        self.keep = keep
        self.launcher_cls = self._launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 1 << 20},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = rest[6:]  # stream, function, metadata twice, hooks
            _addresses(arguments)
            if self.keep:
                self.launched.append((metadata.name, (x, y, z), arguments))

        return run


def _addresses(arguments: tuple[Any, ...]) -> None:
    """Ask every tensor for its address, in tuples too, as the launcher in C does."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            argument.data_ptr()
        elif isinstance(argument, tuple):
            _addresses(argument)


@contextmanager
def no_driver(*, keep: bool = False) -> Iterator[NoDriver]:
    """While it lasts, Triton launches through a `NoDriver`, and the CPU passes for a GPU."""
    driver = NoDriver(keep=keep)
    config = vars(triton.runtime.driver)
    before = dict(config)  # with no GPU there is no driver to go back to by its own means
    triton.runtime.driver.set_active(driver)
    kernels = fused.plan_rows, measure.measure_rows, serve.classify_layers, replanning.replan_layers
    for function in (*kernels, relabelling.relabel_layers, steps.sum_steps):
        function.device_caches.clear()  # what is loaded already goes on launching through the driver that loaded it
    patches = (
        patch.object(launcher, "resolve_device", torch.device),
        patch.object(torch.cuda, "device", lambda _: nullcontext()),
        patch.object(torch.cuda, "current_device", lambda: None),
    )
    try:
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one)
            yield driver
    finally:
        config.clear()
        config.update(before)


def microseconds(call: Any, calls: int) -> float:
    """CPU time of a call: median over chunks of calls, each timed as one."""
    times = []
    for _ in range(max(1, calls // CHUNK)):
        begin = time.process_time_ns()
        for _ in range(CHUNK):
            call()
        times.append((time.process_time_ns() - begin) / 1e3 / CHUNK)
    return median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="deepseek,adaptive_tail_and_2x2_fixup,balanced")
    parser.add_argument("--calls", type=int, default=20_000)
    arguments = parser.parse_args()
    loads = torch.rand(V3.layers, V3.experts)
    with no_driver():
        print("| policy | Launch, us | Planner, us |\n|---|---:|---:|")
        for policy in arguments.policies.split(","):
            planner = Planner(V3.topology, V3.layers, V3.experts, policy=policy, backend="triton", log2phy=True)
            out = planner.empty()
            width = V3.topology.num_replicas - V3.experts + 1
            launch = Launch(
                V3.topology, V3.layers, V3.experts, POLICIES[policy], log2phy_width=width, device="cpu"
            )  # fmt: skip
            alone = microseconds(lambda: launch(loads, out), arguments.calls)  # noqa: B023
            whole = microseconds(lambda: planner(loads, out=out), arguments.calls)  # noqa: B023
            print(f"| {policy} | {alone:.1f} | {whole:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
