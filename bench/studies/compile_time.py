"""CPU seconds from a shape to a compiled kernel, for sm_90, each in a fresh process with an empty cache.

    python -m bench.studies.compile_time [--cases v3-hierarchical,v3-global] [--policies balanced] [--output FILE.md]

What a first plan waits for, but for the loading of the module. Needs no GPU. User and system time of the process and of
the ptxas that it runs; `import torch` and `import triton` are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton

from bench.cases import CASES
from bench.machine import ROOT
from bench.ptx.compiled import compile_plan
from eplb_triton import POLICIES

MEASURED = ("v3-hierarchical", "v3-global", "v3-144-gpus", "512-to-1024", "1024-to-2048")


def cpu_seconds(case: str, policy: str) -> float:
    """Of this process and its children, to compile a plan: in one that has compiled nothing yet."""
    shape = next(known for known in CASES if known.name == case)
    begin = _cpu()
    with tempfile.TemporaryDirectory() as empty:
        list(compile_plan(shape, POLICIES[policy], "sm_90", want_log2phy=False, cache=Path(empty)))
    return _cpu() - begin


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_a_fresh_process(case: str, policy: str) -> float:
    command = [sys.executable, "-m", "bench.studies.compile_time", "--one", case, policy]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(MEASURED), help="comma-separated, of bench.cases")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--output", type=Path, help="Markdown file to write, too")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "POLICY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(cpu_seconds(*arguments.one)))
        return 0
    policies = arguments.policies.split(",")
    lines = [f"| sm_90, Triton {triton.__version__}, CPU s | " + " | ".join(policies) + " |"]
    lines.append("|---|" + "---:|" * len(policies))
    for case in arguments.cases.split(","):
        seconds = [in_a_fresh_process(case, policy) for policy in policies]
        lines.append(f"| {case} | " + " | ".join(f"{found:.1f}" for found in seconds) + " |")
        print("\n".join(lines[-1:] if len(lines) > 3 else lines), flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
