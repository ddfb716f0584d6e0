"""How often each SASS instruction runs, from how often each PTX instruction did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.ptx.listing import Chain, Instruction, Listing
from bench.ptx.machine import Machine


def runs_of(sass: Listing, machine: Machine) -> list[float]:
    """How often each SASS instruction runs: as often as the PTX block that shares most source lines with its block,
    less often by as much as ptxas unrolled it further. Lines that few blocks share say most."""
    ptx = machine.listing
    lines = [Counter(ptx.instructions[at].chain for at in block) for block in ptx.blocks]
    spread = Counter(chain for block in lines for chain in block)
    innermost = [Counter(ptx.instructions[at].chain[:1] for at in block) for block in ptx.blocks]
    spread_innermost = Counter(chain for block in innermost for chain in block)
    reachable = _reachable(sass)
    runs = [0.0] * len(sass.instructions)
    for number, block in enumerate(sass.blocks):
        code = [sass.instructions[at] for at in block]
        slow_path = any(i.opcode.startswith("CALL") and "__internal" in i.text for i in code)
        if number not in reachable or slow_path:
            continue
        own = Counter(instruction.chain for instruction in code)
        best = max(range(len(lines)), key=lambda at: _alike(own, lines[at], spread))
        if not own.keys() & lines[best].keys():  # in functions, what the lines are inlined at is now and then wrong
            own = Counter(instruction.chain[:1] for instruction in code)
            best = max(range(len(lines)), key=lambda at: _alike(own, innermost[at], spread_innermost))
        unrolled = _unrolled(code, [ptx.instructions[at] for at in ptx.blocks[best]])
        for at in block:
            runs[at] = float(machine.counts[ptx.blocks[best].start]) / unrolled
    return runs


def _alike(one: Counter[Chain], other: Counter[Chain], spread: Counter[Chain]) -> float:
    return sum(min(number, other[chain]) / spread[chain] for chain, number in one.items() if chain in other)


def _unrolled(sass: Sequence[Instruction], ptx: Sequence[Instruction]) -> int:
    """Copies of the PTX block in the SASS block, by warp reductions, stores, float64 additions and, in a block of none
    of these, loads at the same lines."""
    for here, there in (("REDUX", "redux"), ("STG", "st.global"), ("DADD", "add.rn.f64"), ("LDG", "ld.global")):
        before: Counter[Chain] = Counter(i.chain for i in ptx if i.opcode.startswith(there))
        after: Counter[Chain] = Counter(i.chain for i in sass if i.opcode.startswith(here))
        both = [chain for chain in before if chain in after]
        if both:
            return max(1, min(after[chain] // before[chain] for chain in both))
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
