"""Estimated cycles of every policy on the shapes that something is asked of: an ESTIMATE, never a measurement.

    python -m bench.studies.cycles --output bench/results/sass-cycles

For sm_90, of a few rows of log-normal loads, of which the slowest counts. How, and what is left out:
bench/ptx/sass_cycles.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import triton

from bench.kernel import estimated
from bench.ptx.sass_cycles import GIGAHERTZ, cycles_of
from bench.ptx.sass_issue import LATENCY
from eplb_triton import POLICIES
from eplb_triton.testing.models import MODELS

PLANNED = [name for name, policy in POLICIES.items() if policy.replan is None]
"""Policies estimated unless others are asked for: the PTX of replanning takes minutes to run."""
TARGETS_US = {"v3-hierarchical": 15.0, "v3-global": 30.0, "512-to-1024": 100.0, "1024-to-2048": 300.0}
"""Microseconds asked of `deepseek`."""
TWICE = ("v3-hierarchical", "v3-global")
"""Cases in which the other policies may take twice that; in the large ones nothing is asked of them."""


def estimate_plan(job: tuple[str, str], rows: int = 1) -> dict[str, object]:
    """A line of the table: (case, policy), its kernels one after the other, of the slowest of `rows` programs.

    Of `balanced` alone much depends on the loads: it stops where a row can gain no more.
    """
    name, policy = job
    estimates = estimated(policy, MODELS[name], "sm_90", rows)
    cycles = cycles_of(estimates)
    return {
        "case": name,
        "policy": policy,
        "rows": rows,
        "estimated_cycles": round(cycles),
        "estimated_us": round(cycles / GIGAHERTZ / 1e3, 1),
        "target_us": target_us(name, policy),
        "kernels": [asdict(kernel) for kernel in estimates],
    }


def target_us(case: str, policy: str) -> float | None:
    """Microseconds asked of a policy, or None."""
    if policy == "deepseek":
        return TARGETS_US[case]
    return 2 * TARGETS_US[case] if case in TWICE and policy in PLANNED else None


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: totals, then every loop of 3% of its plan and more."""
    lines = [
        "# Cycles of a plan, ESTIMATED from SASS for sm_90; nothing here was measured",
        "",
        f"{GIGAHERTZ} GHz, Triton {triton.__version__}; `python -m bench.studies.cycles --output ...`; "
        "bench/ptx/sass_cycles.py says how and what is left out (the launch, 2 to 4 us, and cold misses). Assumed "
        "latencies in cycles: "
        + ", ".join(f"{kind} {cycles}" for kind, cycles in LATENCY.items())
        + ". Loads: log-normal, sigma 1.",
        "",
        "| case | policy | rows | warps | registers | cycles | us | asked: at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    details = [
        "",
        "| case | policy | loop | rounds | cycles a round | cycles | share | instructions | of them |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        kernels: list[dict[str, object]] = row["kernels"]  # type: ignore[assignment]
        last = kernels[-1]
        head = f"| {row['case']} | {row['policy']} |"
        lines.append(
            f"{head} {row['rows']} | {last['num_warps']} | {last['registers']} | {row['estimated_cycles']} | "
            f"{row['estimated_us']} | "
            f"{'–' if row['target_us'] is None else format(row['target_us'], 'g')} |"
        )
        for kernel in kernels:
            details += _details(head, kernel, float(str(row["estimated_cycles"])))
    return "\n".join([*lines, *details]) + "\n"


def _details(head: str, kernel: dict[str, object], total: float) -> list[str]:
    found: list[dict[str, object]] = kernel["loops"]  # type: ignore[assignment]
    once = {
        "function": "(once)",
        "rounds": 1,
        "cycles_each": "",
        "cycles": kernel["straight_cycles"],
        "instructions": "",
        "mix": {},
    }
    lines = []
    for loop in [*found, once]:
        share = float(str(loop["cycles"])) / total
        if share >= 0.03:
            mix = " ".join(f"{kind} {number}" for kind, number in dict(loop["mix"]).items())  # type: ignore[call-overload]
            lines.append(
                f"{head} {kernel['kernel']}: {loop['function']} | {loop['rounds']} | {loop['cycles_each']} | "
                f"{float(str(loop['cycles'])):.0f} | {share:.0%} | {loop['instructions']} | {mix} |"
            )
    return lines


def _lines(path: Path) -> list[dict[str, object]]:
    return list(json.loads(path.read_text())["rows"]) if path.is_file() else []


def _place(line: tuple[str, str]) -> tuple[int, int]:
    """Where a line of the table stands: cases, then policies, in their order."""
    return list(TARGETS_US).index(line[0]), list(POLICIES).index(line[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path without ending: .json and .md are written")
    parser.add_argument("--cases", default=",".join(TARGETS_US), help="comma-separated, of bench.cases")
    parser.add_argument("--policies", default=",".join(PLANNED))
    parser.add_argument("--rows", type=int, default=1, help="programs run, of which the slowest counts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    jobs = [(case, policy) for case in arguments.cases.split(",") for policy in arguments.policies.split(",")]
    path = arguments.output.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {(str(line["case"]), str(line["policy"])): line for line in _lines(path)}  # of an earlier run, too
    with ProcessPoolExecutor(arguments.workers) as pool:
        for line in pool.map(partial(estimate_plan, rows=arguments.rows), jobs):
            lines[str(line["case"]), str(line["policy"])] = line
            rows = [lines[at] for at in sorted(lines, key=_place)]
            found = {"estimate": True, "latency": LATENCY, "rows": rows}
            path.write_text(json.dumps(found, indent=1) + "\n")
            arguments.output.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
