"""`make bench`: every case, every planner, one process; results as JSON and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bench import results
from bench.case_run import run_case
from bench.cases import CASES, MissingTraceError, select, series
from bench.machine import environment
from bench.planners.ours import PUBLISHED, Planner, Skip, best_backend, one_line, ours, probe
from bench.planners.peers import peers
from bench.progress import Steps
from bench.studies import cold
from eplb_triton import POLICIES


@click.command()
@click.option("--cases", default="", help="comma-separated names or globs; all")
@click.option("--planners", default="", help="comma-separated names or globs; the table's")
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), envvar="EPLB_TRACES", help="recordings")
@click.option("--seconds", default=0.5, show_default=True, help="time of a planner in a case, at least 3 rounds")
@click.option("--warm", is_flag=True, help="an untimed call before each timed one, so that it finds warm caches")
@click.option("--cold/--no-cold", "with_cold", default=True, show_default=True, help="first calls in fresh processes")
@click.option("--out", type=click.Path(path_type=Path), help="folder of the results")
def main(
    cases: str, planners: str, traces: Path | None, seconds: float, warm: bool, with_cold: bool, out: Path | None
) -> None:
    """Time and judge every planner on every case, on the same loads in one process."""
    found = environment("bench.run")
    try:
        chosen = [case for case in CASES if case.name in select(cases, [case.name for case in CASES], "case")]
        loaded, skips = peers()
        working, broken = probe([*ours(), *loaded])
        chosen_planners = choose(working, planners)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    skips += broken
    cold_runs = cold.plan(chosen, chosen_planners) if with_cold else []
    rows: list[dict[str, Any]] = []
    first_calls = []
    with Steps(len(chosen) + len(cold_runs)) as steps:
        for case in chosen:
            steps.begin(case.name)
            try:
                loads = series(case, traces)
            except MissingTraceError as missing:
                skips.append(Skip("every planner", str(missing), case.name))
            else:
                rows.append(run_case(case, loads, chosen_planners, seconds, skips, steps.detail, warm=warm))
        for case_name, planner, empty in cold_runs:
            steps.begin(f"first call of {planner}")
            if any(skip.planner == planner and skip.case == case_name for skip in skips):
                continue
            try:
                first_calls.append(cold.cold_call(case_name, planner, empty_cache=empty))
            except RuntimeError as error:
                skips.append(Skip(planner, f"first call in a fresh process: {one_line(error)}", case_name))
    body = {
        "planners": {planner.name: _about(planner) for planner in chosen_planners},
        "skipped": [asdict(skip) for skip in skips],
        "cases": rows,
        "cold": first_calls,
    }
    results.publish("cases", found, body, out)


def choose(working: Sequence[Planner], patterns: str) -> list[Planner]:
    """Planners that match; by default the published algorithm on all backends, other policies on one, and peers."""
    if patterns:
        names = select(patterns, [planner.name for planner in working], "planner")
        return [planner for planner in working if planner.name in names]
    best = best_backend(working)
    return [
        planner
        for planner in working
        if planner.algorithm not in POLICIES or planner.algorithm == PUBLISHED or planner.name.endswith(f"@{best}")
    ]


def _about(planner: Planner) -> dict[str, str]:
    return {name: getattr(planner, name) for name in ("algorithm", "takes", "gives", "source")}


if __name__ == "__main__":
    main()
