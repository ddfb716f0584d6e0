"""Estimated cycles of a plan, per loop and in all, without a GPU: an ESTIMATE, never a measurement.

    python -m bench.sass_cycles --output bench/results/sass-cycles

How: the kernels are compiled for sm_90 as the launcher would, but in one piece, with their stages inlined; their PTX is
run on the CPU (bench.ptx) for a few rows of log-normal loads, of which the slowest counts, and that tells how often
each basic block runs; each block of the SASS is matched to the block of the PTX that comes from the same source lines;
and one warp issues it in order, with ptxas's stall counts and scoreboards and the latencies of bench.sass_issue. A loop
counts its steady round times its rounds, the rest once.

Several warps: each is taken to issue the same code; a round takes at least its instructions times the warps that share
one of the four schedulers, and a barrier 22 cycles, as if the warps arrived together. Left out: the launch (2 to 4 us),
the first touch of memory (under 1 us each time it is waited for), divisions that take the subroutine for subnormal
numbers, other programs on the multiprocessor, log2phy (`plan` makes it on request alone), the calls of stages (some 20
cycles each, about ten a plan), and what a second wave would add (none: all programs fit at once).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import triton

from bench.cases import CASES
from bench.compiled import Compiled, compile_plan
from bench.listing import Instruction, Listing, Loop, functions, parse_sass
from bench.ptx.machine import Machine
from bench.ptx.plans import run_plan
from bench.sass_issue import LATENCY, each_round, straight
from eplb_triton import POLICIES
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.testing.families import loads

GIGAHERTZ = 1.7
TARGETS_US = {"v3-hierarchical": 15.0, "v3-global": 30.0, "512-to-1024": 100.0, "1024-to-2048": 300.0}
"""Microseconds asked of `deepseek`."""
TWICE = ("v3-hierarchical", "v3-global")
"""Cases in which the other policies may take twice that; in the large ones nothing is asked of them."""
_SCHEDULERS = 4
_COUNTED = ("REDUX", "SHFL", "LDG", "STG", "LDS", "STS", "BAR", "MUFU", "DADD")


@dataclass(frozen=True)
class LoopEstimate:
    """One loop of a kernel; `rounds`: of the SASS loop, which may be several steps of the source."""

    function: str
    rounds: float
    cycles_each: float
    cycles: float
    instructions: int
    mix: dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """One kernel of a plan, one program of it."""

    kernel: str
    num_warps: int
    registers: int
    cycles: float
    straight_cycles: float
    loops: list[LoopEstimate]


def estimate(kernel: Compiled, machine: Machine) -> Estimate:
    """Cycles of one program, `machine` having run the PTX of `kernel` for one program."""
    sass = parse_sass(kernel.sass())
    runs = _runs(sass, machine)
    sharing = -(-kernel.num_warps // _SCHEDULERS)
    loops = []
    for loop in sass.loops:
        found = _loop(sass, loop, runs, sharing)
        if found:
            loops.append(found)
    inside = {at for loop in sass.loops for at in loop.body}
    once = 0.0
    for start, stop in pairwise([*sass.entries, len(sass.instructions)]):
        calls = runs[start]  # of a function; what of it is in no loop overlaps from its beginning to its end
        outside = [at for at in range(start, stop) if at not in inside and runs[at] >= max(0.5, 0.5 * calls)]
        code = [sass.instructions[at] for at in outside]
        once += calls * max(straight(code), len(code) * sharing)
    total = once + sum(loop.cycles for loop in loops)
    return Estimate(kernel.name, kernel.num_warps, kernel.resources()["REG"], total, once, loops)


def _runs(sass: Listing, machine: Machine) -> list[float]:
    """How often each SASS instruction runs: as often as the PTX block that shares most source lines with its block,
    less often by as much as ptxas unrolled it further. Lines that few blocks share say most."""
    ptx = machine.listing
    readings = [
        _spread([Counter(read(ptx.instructions[at]) for at in block) for block in ptx.blocks]) for read in _READ
    ]
    of_function: dict[str, list[int]] = defaultdict(list)
    for number, block in enumerate(ptx.blocks):
        of_function[ptx.name_at(block.start)].append(number)
    reachable = _reachable(sass)
    runs = [0.0] * len(sass.instructions)
    for number, block in enumerate(sass.blocks):
        code = [sass.instructions[at] for at in block]
        slow_path = any(i.opcode.startswith("CALL") and "__internal" in i.text for i in code)
        if number not in reachable or slow_path:
            continue
        candidates = of_function[sass.name_at(block.start)]
        for read, (lines, spread) in zip(_READ, readings, strict=True):
            own = Counter(read(instruction) for instruction in code)
            best = max(candidates, key=lambda at: _alike(own, lines[at], spread))
            if own.keys() & lines[best].keys():
                break
        unrolled = _unrolled(code, [ptx.instructions[at] for at in ptx.blocks[best]], read)
        for at in block:
            runs[at] = float(machine.counts[ptx.blocks[best].start]) / unrolled
    return runs


_READ: tuple[Callable[[Instruction], object], ...] = (
    lambda instruction: instruction.chain,
    lambda instruction: instruction.chain[:1],
    lambda instruction: tuple(place.line for place in instruction.chain[:1]),
)
"""What an instruction is known by: its line and those that it is inlined at, the line alone, or its number alone: in
functions, what lines are inlined at, and of which file, is now and then wrong in SASS."""


def _spread(blocks: list[Counter[object]]) -> tuple[list[Counter[object]], Counter[object]]:
    """Blocks, and in how many of them each line is."""
    return blocks, Counter(line for block in blocks for line in block)


def _alike(one: Counter[object], other: Counter[object], spread: Counter[object]) -> float:
    return sum(min(number, other[chain]) / spread[chain] for chain, number in one.items() if chain in other)


def _unrolled(sass: Sequence[Instruction], ptx: Sequence[Instruction], read: Callable[[Instruction], object]) -> int:
    """Copies of the PTX block in the SASS block, by warp reductions, stores, float64 additions and, in a block of none
    of these, loads at the same lines."""
    for here, there in (("REDUX", "redux"), ("STG", "st.global"), ("DADD", "add.rn.f64"), ("LDG", "ld.global")):
        before = Counter(read(i) for i in ptx if i.opcode.startswith(there))
        after = Counter(read(i) for i in sass if i.opcode.startswith(here))
        both = [line for line in before if line in after]
        if both:
            return max(1, min(after[line] // before[line] for line in both))
    return 1


def _reachable(listing: Listing) -> set[int]:
    at = {block.start: number for number, block in enumerate(listing.blocks)}
    stack = [at[entry] for entry in listing.entries]
    seen = set(stack)
    while stack:
        fresh = set(listing.successors[stack.pop()]) - seen
        seen |= fresh
        stack += fresh
    return seen


def _loop(sass: Listing, loop: Loop, runs: Sequence[float], sharing: int) -> LoopEstimate | None:
    """The loop's own instructions, without those of the loops in it: what runs in most rounds as a steady round, each
    other block by itself as often as it runs. A round that passes over a branch of most rounds is without it."""
    inner = {at for other in sass.loops if other is not loop and set(other.body) < set(loop.body) for at in other.body}
    own = [at for at in loop.body if at not in inner]
    rounds = runs[loop.head] or max(runs[at] for at in own)
    if not rounds:
        return None
    usual = [sass.instructions[at] for at in own if runs[at] >= 0.5 * rounds]
    cycles_each = max(each_round(usual) if rounds > 1 else straight(usual), len(usual) * sharing)
    seldom: dict[float, list[Instruction]] = defaultdict(list)
    for at in own:
        if 0 < runs[at] < 0.5 * rounds:
            seldom[runs[at]].append(sass.instructions[at])
    always = [sass.instructions[at] for at in own if runs[at] >= 0.99 * rounds]
    often = [runs[at] for at in own if 0.5 * rounds <= runs[at] < 0.99 * rounds]
    passed_over = rounds - sum(often) / len(often) if often and always and rounds > 1 else 0.0
    saved = max(0.0, cycles_each - max(each_round(always), len(always) * sharing)) if passed_over else 0.0
    cycles = rounds * cycles_each - passed_over * saved + sum(often * straight(code) for often, code in seldom.items())
    calls = Counter(tuple(reversed(functions(instruction.chain)))[1:4] for instruction in usual)
    mix = Counter(instruction.opcode.split(".")[0] for instruction in usual)
    return LoopEstimate(
        " > ".join(calls.most_common(1)[0][0]),
        round(rounds, 1),
        round(cycles_each, 1),
        round(cycles),
        len(usual),
        {kind: mix[kind] for kind in _COUNTED if kind in mix},
    )


def estimate_plan(job: tuple[str, str], rows: int = 1) -> dict[str, object]:
    """A line of the table: (case, policy), its kernels one after the other, of the slowest of `rows` programs.

    Of `balanced` alone much depends on the loads: it stops where a row can gain no more.
    """
    name, policy = job
    case = next(case for case in CASES if case.name == name)
    kernels = list(compile_plan(case, POLICIES[policy], "sm_90", want_log2phy=False, inlined=True))
    launch = launch_plan(case.topology, case.experts, POLICIES[policy])
    weight = loads("continuous", 1, case.layers, case.experts)
    estimates: list[Estimate] = []
    for program in list(np.ndindex(case.layers, case.topology.planned_nodes))[:rows]:
        ran = run_plan(kernels, launch, case.topology, weight, programs=[program])
        found = [estimate(kernel, machine) for kernel, machine in zip(kernels, ran.machines, strict=True)]
        estimates = max(estimates, found, key=_cycles)
    cycles = _cycles(estimates)
    return {
        "case": name,
        "policy": policy,
        "rows": rows,
        "estimated_cycles": round(cycles),
        "estimated_us": round(cycles / GIGAHERTZ / 1e3, 1),
        "target_us": target_us(name, policy),
        "kernels": [asdict(kernel) for kernel in estimates],
    }


def _cycles(kernels: Sequence[Estimate]) -> float:
    return sum(kernel.cycles for kernel in kernels)


def target_us(case: str, policy: str) -> float | None:
    """Microseconds asked of a policy, or None."""
    if policy == "deepseek":
        return TARGETS_US[case]
    return 2 * TARGETS_US[case] if case in TWICE else None


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown: totals, then every loop of 3% of its plan and more."""
    lines = [
        "# Cycles of a plan, ESTIMATED from SASS for sm_90; nothing here was measured",
        "",
        f"{GIGAHERTZ} GHz, Triton {triton.__version__}; `python -m bench.sass_cycles --output ...`, whose text says "
        "how and what is left out (the launch, 2 to 4 us, and cold misses). Assumed latencies in cycles: "
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
    parser.add_argument("--policies", default=",".join(POLICIES))
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
