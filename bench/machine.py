"""Where a result comes from: machine, system, versions, commit, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.planners.fetch import FOLDER, MANIFEST

ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "numpy", "triton", "numba", "scipy")
_SETTINGS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR", "NPY_DISABLE_CPU_FEATURES", "TRITON_INTERPRET")


def environment(module: str) -> dict[str, Any]:
    """Everything a reader needs to trace a number; `module` is the one that ran, `bench.run` say."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "torch_threads": torch.get_num_threads(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "load_average": os.getloadavg()[0],
        "commit": _git("rev-parse", "HEAD"),
        # Results and the tables made from them are no part of what is measured.
        "dirty": bool(_git("status", "--porcelain", "--", ":!bench/results", ":!docs", ":!README.md")),
        "peers": json.loads((FOLDER / MANIFEST).read_text()) if (FOLDER / MANIFEST).is_file() else {},
    }


def machine_class(found: dict[str, Any]) -> str:
    """A short name for the kind of machine: CPU, cores, GPU."""
    words = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", found["cpu"])
    gpu = f" {found['gpu'].removeprefix('NVIDIA')}" if found["gpu"] else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {found['cores']}c{gpu}".lower()).strip("-")


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name the system gives the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of this checkout, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
