"""How often each SASS instruction runs, from how often each PTX instruction did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from bench.ptx.listing import Instruction, Listing
from bench.ptx.machine import Machine


def runs_of(sass: Listing, machine: Machine) -> list[float]:
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
