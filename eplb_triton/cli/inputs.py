"""What the user gave, looked at before any work is done."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import torch

from eplb_triton import Topology
from eplb_triton.backends import resolve_backend
from eplb_triton.cli import INSTALL, INSTALL_BOUND, INSTALL_CPU
from eplb_triton.cli.options import LoadsFile
from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.formats import Recording, check_writable, read_loads
from eplb_triton.printing import one_line, shown

_PACKAGES = {"cpu": ("numba", INSTALL_CPU), "triton": ("triton", "pip install triton")}


def read(loads: LoadsFile, num_experts: int | None = None) -> Recording:
    """The recording, or a refusal; of `num_experts` experts, if that is known."""
    with refusing():
        return read_loads(loads.path, key=loads.key, kind=loads.kind, num_experts=num_experts or loads.num_experts)


def read_for(loads: LoadsFile, topology: Topology) -> Recording:
    """The recording, of a number of experts that the topology can hold, or a refusal."""
    recording = read(loads)
    with refusing(loads.path):
        topology.check_experts(recording.num_experts)
    return recording


def check_backend(backend: str) -> None:
    """Refuse a backend whose package is missing; say what is used where the best one for the CPU is."""
    if backend in _PACKAGES:
        package, install = _PACKAGES[backend]
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != package:
                raise Refused(f"--backend {backend} cannot use {package}: {one_line(error)}") from error
            raise Refused(f"--backend {backend} needs {package}: {install}") from error
        except ImportError as error:  # numba refuses some versions of NumPy, for example
            raise Refused(f"--backend {backend} cannot use {package}: {one_line(error)}") from error
    elif backend == "auto" and resolve_backend(backend, torch.device("cpu")) == "reference":
        print(f"eplb-triton: planning without numba takes 5 to 100 times as long: {INSTALL_CPU}", file=sys.stderr)


def check_pairing(pairing: bool, topology: Topology) -> None:
    """Refuse a lower bound that cannot be computed here."""
    if not pairing or topology.slots_per_gpu != 2:
        return
    try:
        import_module("eplb_triton.bound.pairing")
    except ImportError as error:
        raise Refused(f"--pairing-bound needs SciPy: {INSTALL_BOUND}") from error


def check_output(path: Path | None, suffixes: tuple[str, ...], loads: Path | None = None) -> None:
    """Refuse an output that could not be written or would replace the loads it is made from."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        found = f"a name that ends in {path.suffix or 'no suffix'!r}"
        raise Refused(f"{shown(path)}: expected an output file that ends in {', '.join(suffixes)}; found {found}")
    with refusing():
        check_writable(path)
    if loads is not None and os.path.realpath(path) == os.path.realpath(loads):
        raise Refused(f"{shown(path)}: expected an output file of its own; found the file of loads")


def check_plot(path: Path | None, loads: Path | None = None) -> None:
    """Refuse a plot that could not be drawn or written."""
    if path is None:
        return
    try:
        from eplb_triton.cli import plots  # noqa: PLC0415 - matplotlib takes a second to import and may be missing
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise Refused(f"--plot needs {package}: {INSTALL}") from error
    check_output(path, plots.SUFFIXES, loads)


def check_report(path: Path | None) -> None:
    """Refuse a report that could not be made or written."""
    if path is None:
        return
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise Refused(f"--report needs matplotlib: {INSTALL}") from error
    check_output(path, (".html",))
