"""A failing case as a file: loads, topology, policy and what came out, enough to see it fail again anywhere."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eplb_triton.backends import BACKENDS
from eplb_triton.formats.atomic import check_writable, write_whole
from eplb_triton.placement import Placement
from eplb_triton.planner import plan
from eplb_triton.testing.comparing import first_difference
from eplb_triton.topology import Topology


class Reproducer(NamedTuple):
    """What a reproducer file holds."""

    loads: Tensor  # [L, E], of the dtype that was planned
    topology: Topology
    policy: str
    note: str
    versions: dict[str, str]  # of the packages where it failed
    phy2log: Tensor | None  # [L, P], what came out there


def write_reproducer(
    path: Path | str, loads: Tensor, topology: Topology, policy: str, *, got: Placement | None = None, note: str = ""
) -> Path:
    """Write a failing case to a .npz file, whole or not at all; a few KB, to attach to a report.

    Args:
        path: where; a file that is there is replaced.
        loads: [L, E], what was planned for.
        topology: as planned.
        policy: a name of `POLICIES`.
        got: the placement that is wrong, if there is one.
        note: what is wrong with it.

    Returns:
        The path.

    Raises:
        FormatError: the file cannot be written.
    """
    path = Path(path)
    check_writable(path)
    about = {
        "topology": dataclasses.asdict(topology),
        "policy": policy,
        "note": note,
        "dtype": str(loads.dtype).removeprefix("torch."),
        "versions": _versions(),
    }
    wide = loads.detach().cpu()
    arrays: dict[str, Any] = {
        "about": np.array(json.dumps(about)),
        "loads": (wide.double() if wide.is_floating_point() else wide.long()).numpy(),
    }
    if got is not None:
        arrays["phy2log"] = got.phy2log.cpu().long().numpy()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_whole(path, file.getvalue())
    return path


def read_reproducer(path: Path | str) -> Reproducer:
    """What `write_reproducer` wrote.

    Raises:
        OSError, ValueError, KeyError: the file is none of its.
    """
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        loads = torch.from_numpy(arrays["loads"]).to(getattr(torch, about["dtype"]))
        phy2log = torch.from_numpy(arrays["phy2log"]) if "phy2log" in arrays else None
    topology = Topology(**about["topology"])
    return Reproducer(loads, topology, about["policy"], about["note"], about["versions"], phy2log)


def run_reproducer(path: Path | str) -> list[str]:
    """Plan a recorded case with every backend that there is, and compare them to the bit.

    Returns:
        A line a backend: what differs from `reference`, or that nothing does; and one for what was recorded.
    """
    case = read_reproducer(path)
    want = plan(case.loads, case.topology, case.policy, backend="reference")
    lines = []
    if case.phy2log is not None:
        recorded = Placement.from_phy2log(case.phy2log, want.num_experts, case.topology)
        lines.append(f"recorded: {first_difference(recorded, want) or 'as reference plans'}")
    for backend in BACKENDS[1:-1]:
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        try:
            got = plan(case.loads.to(device), case.topology, case.policy, backend=backend)
        except (ImportError, ValueError) as error:
            lines.append(f"{backend}: not run, {error}")
            continue
        lines.append(f"{backend}: {first_difference(got, want, exact=True) or 'the bits of reference'}")
    return lines


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    for package in ("triton", "numba"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = "none"
    return versions
