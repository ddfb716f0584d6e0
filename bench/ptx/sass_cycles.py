"""Estimated cycles of a program, per loop and in all, without a GPU: an ESTIMATE, never a measurement.

How: the kernels are compiled for sm_90 as the launcher would, but in one piece, with their stages inlined; their PTX is
run on the CPU (bench.ptx) and that tells how often
each basic block runs; each block of the SASS is matched to the block of the PTX that comes from the same source lines;
and one warp issues it in order, with ptxas's stall counts and scoreboards and the latencies of bench.ptx.sass_issue. A
loop counts its steady round times its rounds, the rest once.

Several warps: each is taken to issue the same code; a round takes at least its instructions times the warps that share
one of the four schedulers, and a barrier 22 cycles, as if the warps arrived together. Left out: the launch (2 to 4 us),
the first touch of memory (under 1 us each time it is waited for), divisions that take the subroutine for subnormal
numbers, other programs on the multiprocessor, log2phy (`plan` makes it on request alone), the calls of stages (some 20
cycles each, about ten a plan), and what a second wave would add (none: all programs fit at once).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from bench.ptx.compiled import Compiled
from bench.ptx.listing import Instruction, Listing, Loop, functions
from bench.ptx.machine import Machine
from bench.ptx.plans import run_plan
from bench.ptx.sass_issue import each_round, straight
from bench.ptx.sass_runs import runs_of
from eplb_triton.kernels.specs import LaunchPlan
from eplb_triton.topology import Topology

GIGAHERTZ = 1.7
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
    sass = kernel.sass_listing
    runs = runs_of(sass, machine)
    sharing = -(-kernel.num_warps // _SCHEDULERS)
    loops = []
    for loop in sass.loops:
        found = estimate_loop(sass, loop, runs, sharing)
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
    return Estimate(kernel.name, kernel.num_warps, kernel.resources["REG"], total, once, loops)


def estimate_loop(sass: Listing, loop: Loop, runs: Sequence[float], sharing: int) -> LoopEstimate | None:
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


def slowest_program(
    kernels: Sequence[Compiled],
    launch: LaunchPlan,
    topology: Topology,
    weight: Tensor,
    programs: Iterable[tuple[int, int]],
) -> list[Estimate]:
    """Each kernel of a plan of `weight` [L, E], of that one of `programs` (layer, node) that takes most cycles in all.

    Ties: the first one. Programs that run every instruction as often as an earlier one are not estimated again.
    """
    machines = [Machine(kernel.ptx, kernel.num_warps) for kernel in kernels]
    seen: set[tuple[bytes, ...]] = set()
    found: list[Estimate] = []
    for program in programs:
        for machine in machines:
            machine.counts.fill(0)
        run_plan(kernels, launch, topology, weight, programs=[program], machines=machines)
        counts = tuple(machine.counts.tobytes() for machine in machines)
        if counts not in seen:
            seen.add(counts)
            one = [estimate(kernel, machine) for kernel, machine in zip(kernels, machines, strict=True)]
            found = max(found, one, key=cycles_of)
    return found


def cycles_of(kernels: Iterable[Estimate]) -> float:
    """Of kernels one after the other."""
    return sum(kernel.cycles for kernel in kernels)
