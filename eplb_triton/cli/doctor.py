"""The command doctor: what is installed, enabled and compiled, and whether planning works here."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points

import click
import torch

from eplb_triton import Planner, Topology, __version__
from eplb_triton.backends import resolve_backend
from eplb_triton.constants import SPEC_VERSION
from eplb_triton.integrations.registering import WRITTEN_FOR, installed
from eplb_triton.integrations.settings import PREFIX, enabled, read_settings

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
PACKAGES = ("torch", "triton", "numba", "numpy", "scipy", "prometheus_client")


def examine() -> int:
    """Print the findings, a line each; 1 if what is enabled here would not work."""
    faults = 0
    for good, line in (*_packages(), *_frameworks(), *_settings(), *_planning()):
        faults += not good
        click.echo(f"{'ok ' if good else 'BAD'}  {line}")
    return min(faults, 1)


def _packages() -> Iterator[tuple[bool, str]]:
    yield True, f"eplb_triton {__version__}, specification {SPEC_VERSION}, Python {platform.python_version()}"
    yield True, ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PACKAGES)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield True, f"{gpus} GPUs; auto plans with {_auto('cuda') if gpus else _auto('cpu')}"


def _auto(device: str) -> str:
    return resolve_backend("auto", torch.device(device))


def _frameworks() -> Iterator[tuple[bool, str]]:
    for name, group in GROUPS.items():
        found, variable = installed(name), f"{PREFIX}{name.upper()}"
        try:
            on = enabled(name)
        except ValueError as error:
            yield False, str(error)
            continue
        state = "enabled" if on else f"off ({variable}=1 enables it)"
        version = "not installed" if found is None else f"{found}, written for {WRITTEN_FOR[name]}"
        yield not (on and found is None), f"{name} {version}; {state}"
        if found is not None or on:
            registered = any(point.name == "eplb_triton" for point in entry_points(group=group))
            yield (
                registered,
                f"{name}: entry point {'found' if registered else 'missing: install eplb-triton by pip'}",
            )
        if found is not None and on:
            yield _registering(name)


def _registering(name: str) -> tuple[bool, str]:
    """Register in this process, as a worker does: it imports the framework, for tens of seconds."""
    if import_module(f"eplb_triton.integrations.{name}").register():
        return True, f"{name}: registers; this package would plan"
    return False, f"{name}: does not register, the log says why; its own planner would plan"


def _settings() -> Iterator[tuple[bool, str]]:
    for name in sorted(name for name in os.environ if name.startswith(PREFIX)):
        yield True, f"{name}={os.environ[name]}"
    try:
        read = read_settings()
    except ValueError as error:
        yield False, f"{error}; the framework's own planner would plan"
    else:
        stop = "; the stop file is there: stopped" if read.stop_asked() else ""
        yield True, f"policy {read.policy.name}, backend {read.backend}, {'shadow' if read.shadow else 'deploys'}{stop}"


def _planning() -> Iterator[tuple[bool, str]]:
    try:
        policy, backend = read_settings().policy, read_settings().backend
    except ValueError:
        return
    device = torch.device("cuda" if torch.cuda.is_available() and backend == "triton" else "cpu")
    topology, loads = Topology(num_replicas=6, num_gpus=2), torch.tensor([[4.0, 3, 2, 1]], device=device)
    try:
        started = time.perf_counter()
        planner = Planner(topology, 1, 4, policy=policy, backend=backend, device=device)
        planner(loads).validate()
        compiled, started = time.perf_counter() - started, time.perf_counter()
        planner(loads).validate()
    except Exception as error:
        yield False, f"planning with policy {policy.name} failed: {type(error).__name__}: {error}"
        return
    again = time.perf_counter() - started
    cold = " (compiled just now; `eplb-triton warm` does it ahead)" if compiled > 3 else ""
    yield True, f"plans with {planner.backend}: ready in {compiled:.1f} s{cold}, then {1e3 * again:.1f} ms a plan"
