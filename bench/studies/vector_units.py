"""vLLM's maps under NumPy's sorts for different vector units, each in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench import tables
from bench.cases import CASES, series
from bench.machine import ROOT
from bench.planners.ours import PUBLISHED, Planner, ours
from bench.planners.peers import VLLM, peers
from eplb_triton import Topology
from eplb_triton.testing import canonical

TIED, TIE_FREE = "v3-ties", "v3-hierarchical"
OURS = f"{PUBLISHED}@reference"


class UnavailableError(Exception):
    """This machine or NumPy cannot show the difference."""


def settings() -> dict[str, str]:
    """NPY_DISABLE_CPU_FEATURES of each kind of CPU that this one can stand in for, the present one first.

    Raises:
        UnavailableError: NumPy has no faster code for this CPU than its baseline.
    """
    umath: Any = importlib.import_module("numpy._core._multiarray_umath")  # private: NumPy has no other word on it
    usable = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    if not usable:
        raise UnavailableError(f"NumPy {np.__version__} dispatches to no vector unit of this CPU")
    found = {"this CPU as it is": ""}
    avx512 = [name for name in usable if name.startswith("AVX512") or name == "X86_V4"]
    if avx512 and len(avx512) < len(usable):
        found["without AVX-512"] = " ".join(avx512)
    found["baseline only"] = " ".join(usable)
    return found


def compare() -> dict[str, Any]:
    """Layers whose map under each setting differs from the map under the first, vLLM's and ours.

    Raises:
        UnavailableError: see `settings`.
    """
    maps, names = {}, settings()
    with tempfile.TemporaryDirectory() as folder:
        loads = Path(folder) / "loads.npz"  # made once: NumPy's exp, too, depends on the vector units
        _save(loads, {case.name: series(case).numpy() for case in CASES if case.name in (TIED, TIE_FREE)})
        for at, disabled in enumerate(names.values()):
            path = Path(folder) / f"{at}.npz"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
            environment["NPY_DISABLE_CPU_FEATURES"] = disabled
            command = [sys.executable, "-m", "bench.studies.vector_units", str(loads), str(path)]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            with np.load(path) as archive:
                maps[at] = {name: archive[name] for name in archive.files}
    rows: dict[str, dict[str, int]] = {}
    for at, name in enumerate(names):
        rows[name] = {key: int((maps[at][key] != maps[0][key]).any(axis=1).sum()) for key in maps[0]}
    layers = {key: len(rows_of) for key, rows_of in maps[0].items()}
    return {"numpy": np.__version__, "disabled": names, "layers": layers, "differing_layers": rows}


def table(result: dict[str, Any]) -> str:
    """Layers whose map changes with the vector units NumPy may use."""
    if "vector_units" not in result:
        return ""
    found = result["vector_units"]
    names = list(found["layers"])
    rows = []
    for setting, differing in found["differing_layers"].items():
        disabled = found["disabled"][setting]
        label = f'{setting} (`NPY_DISABLE_CPU_FEATURES="{disabled}"`)' if disabled else setting
        rows.append([label, *(f"{differing[name]} / {found['layers'][name]}" for name in names)])
    note = (
        f"Layers whose map is another one than on this CPU as it is; NumPy {found['numpy']}, the same loads, "
        "one process a setting."
    )
    return f"{tables.table(['NumPy may use', *names], rows)}\n\n{note}"


@click.command()
@click.argument("loads", type=click.Path(path_type=Path))
@click.argument("path", type=click.Path(path_type=Path))
def main(loads: Path, path: Path) -> None:
    """Write the canonical maps of the cases in LOADS, vLLM's and ours, to PATH."""
    (vllm,) = [planner for planner in peers()[0] if planner.name == VLLM]
    (reference,) = [planner for planner in ours() if planner.name == OURS]
    topology = {case.name: case.topology for case in CASES}
    maps = {}
    with np.load(loads) as archive:
        for planner in (vllm, reference):
            for name in archive.files:
                maps[f"{planner.name} on {name}"] = _maps(planner, torch.from_numpy(archive[name]), topology[name])
    _save(path, maps)


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    named: dict[str, Any] = arrays  # NumPy's stub takes any keyword for its own allow_pickle
    np.savez(path, **named)


def _maps(planner: Planner, windows: Tensor, topology: Topology) -> NDArray[np.int64]:
    """Canonical maps [T * L, P] of all windows [T, L, E]."""
    plans = [planner.placement(loads, topology).phy2log for loads in windows]
    return torch.cat([canonical(phy2log, topology) for phy2log in plans]).numpy()


if __name__ == "__main__":
    main()
