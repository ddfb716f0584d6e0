"""Results on disk: one folder a date and machine class, one JSON a kind of run, the report beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from bench.machine import ROOT, machine_class
from eplb_triton import BALANCEDNESS

RESULTS = ROOT / "bench" / "results"
KINDS = ("cases", "scale", "next-window", "conformance", "balance")
_DIGITS = 6
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
"""A list of numbers: written on one line."""


def save(kind: str, environment: dict[str, Any], body: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `kind`.json and return its path; by default under `RESULTS`/<date>-<machine class>/."""
    folder = folder or RESULTS / f"{environment['date'][:10]}-{machine_class(environment)}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.json"
    whole = {"kind": kind, "balancedness": BALANCEDNESS, "environment": environment, **body}
    text = json.dumps(_rounded(whole), indent=1)
    path.write_text(_NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n")
    return path


def publish(kind: str, environment: dict[str, Any], body: dict[str, Any], folder: Path | None = None) -> None:
    """`save`, write the report of the folder anew, and say where both are."""
    from bench.report import write_report  # noqa: PLC0415 - the report knows every study, and each ends here

    path = save(kind, environment, body, folder)
    click.echo(f"results: {relative(path)}\nreport:  {relative(write_report(path.parent))}")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result of a folder by kind; each knows its `path`, relative to the repository where it is inside."""
    found = {}
    for kind in KINDS:
        path = folder / f"{kind}.json"
        if path.is_file():
            found[kind] = {**json.loads(path.read_text()), "path": relative(path)}
    return found


def relative(path: Path) -> str:
    """`path` as the repository sees it, or as it is outside of it."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _rounded(value: Any) -> Any:
    """`value` with floats of six digits: timers and means carry no more."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
