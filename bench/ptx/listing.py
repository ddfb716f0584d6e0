"""PTX and SASS as lists of instructions, each with its source line, and the loops they form."""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_OPCODE = re.compile(r"(?:@!?U?%?[Pp]\w+\s+)?([A-Za-z][\w.:]*)")
_PTX_LOC = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:.*?inlined_at (\d+) (\d+) (\d+))?")
_FUNCTION = re.compile(r"^(?:\.visible )?(\.(?:entry|func)[^;{]*?)^{$(.*?)^}$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"\.(?:entry|func)\s+(?:\(.*?\)\s*)?([\w$]+)")
_PTX_LABEL = re.compile(r"^(\$L__BB\w+):")
_PTX_OPCODE = re.compile(r"(?:@!?%p\d+\s+)?[a-z]\w*[.\w:]*(?:\s|;)")
_SASS_LABEL = re.compile(r"^(\.L_x\w+):")
_SASS_FUNCTION = re.compile(r"^(?!\$__internal)\$\w+\$([\w$]+):")
_SASS_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
_SASS_LOW = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SASS_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


class Place(NamedTuple):
    """A line of source."""

    path: str
    line: int

    @property
    def function(self) -> str:
        """Name of the function around the line."""
        return next((name for name, first, last in _functions(self.path) if first <= self.line <= last), "")

    @property
    def text(self) -> str:
        return _lines(self.path)[self.line - 1].strip()


Chain = tuple[Place, ...]
"""A place, the call it is inlined at, and so on outwards."""


@dataclass(frozen=True)
class Instruction:
    """`control`: the scheduling bits of a SASS instruction, 0 in PTX."""

    text: str
    chain: Chain
    control: int = 0

    @property
    def opcode(self) -> str:
        """In full, without its predicate: `st.global.b32`, `REDUX.MIN.S32`."""
        found = _OPCODE.match(self.text)
        return found.group(1) if found else ""

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")


class Loop(NamedTuple):
    """A natural loop: its first instruction, and all of them in the order of the text."""

    head: int
    body: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """`labels`: index of the instruction that follows each label; `entries`: of the first one of each function, the
    kernel's before those that it calls; `names`: theirs, "" for the kernel's."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]
    entries: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ("",)

    def name_at(self, at: int) -> str:
        """Name of the function that instruction `at` belongs to."""
        return self.names[bisect_right(self.entries, at) - 1]

    @cached_property
    def blocks(self) -> list[range]:
        """Runs of instructions without a jump into or out of them but at their ends."""
        starts = {*self.entries, len(self.instructions), *self.labels.values()}
        starts |= {i + 1 for i, instruction in enumerate(self.instructions) if _ends_block(instruction)}
        ordered = sorted(start for start in starts if start <= len(self.instructions))
        return [range(start, stop) for start, stop in pairwise(ordered)]

    @cached_property
    def successors(self) -> list[list[int]]:
        """Blocks that may follow each block."""
        at = {block.start: number for number, block in enumerate(self.blocks)}
        following = []
        for number, block in enumerate(self.blocks):
            last = self.instructions[block.stop - 1]
            next_block = [number + 1] if number + 1 < len(self.blocks) else []
            if not _leaves(last):
                following.append(next_block)
                continue
            # BRA.DIV leaves for a copy of the code for a warp whose threads are apart: these kernels have none such
            together = last.opcode == "BRA.DIV"
            target = re.search(r"\$L__BB\w+|\.L_x\w+", last.text) if not together else None
            jumps = [at[self.labels[target.group(0)]]] if target else []
            following.append(jumps + (next_block if last.predicated or together else []))
        return following

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, outer ones before those inside them."""
        reachable, dominators = self._dominators()
        bodies: dict[int, set[int]] = {}
        for end in reachable:
            for head in self.successors[end]:
                if head in dominators[end]:
                    bodies.setdefault(head, {head}).update(self._reaching(end, head))
        loops = [
            Loop(self.blocks[head].start, tuple(i for number in sorted(body) for i in self.blocks[number]))
            for head, body in bodies.items()
        ]
        return sorted(loops, key=lambda loop: (loop.head, -len(loop.body)))

    def _dominators(self) -> tuple[list[int], dict[int, set[int]]]:
        """Blocks that can be reached, and for each the blocks on every way to it."""
        at = {block.start: number for number, block in enumerate(self.blocks)}
        roots = [at[entry] for entry in self.entries]
        order, stack = [], list(roots)
        seen = set(roots)
        while stack:
            order.append(block := stack.pop())
            fresh = [following for following in self.successors[block] if following not in seen]
            seen.update(fresh)
            stack += fresh
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for following in self.successors[block]:
                before[following].append(block)
        dominators = {block: set(order) for block in order} | {root: {root} for root in roots}
        changed = True
        while changed:
            changed = False
            for block in order:
                if block in roots:
                    continue
                found = set.intersection(*(dominators[previous] for previous in before[block])) | {block}
                changed |= found != dominators[block]
                dominators[block] = found
        return order, dominators

    def _reaching(self, end: int, head: int) -> set[int]:
        """Blocks from which `end` can be reached without passing `head`."""
        found, stack = {end}, [end]
        while stack:
            block = stack.pop()
            if block == head:
                continue
            fresh = {previous for previous, after in enumerate(self.successors) if block in after} - found
            found |= fresh
            stack += fresh
        return found | {head}


def _leaves(instruction: Instruction) -> bool:
    """Whether control may go elsewhere than to the next instruction; calls return."""
    return re.match(r"BRA\b|BRX|EXIT|RET|bra\b|ret\b", instruction.opcode) is not None


def _ends_block(instruction: Instruction) -> bool:
    return _leaves(instruction) or instruction.opcode.startswith("call")


def functions(chain: Chain) -> list[str]:
    """Names of the product's functions of a chain, innermost first; Triton's own are left out."""
    return [place.function for place in chain if "/triton/language/" not in place.path]


def parse_ptx(ptx: str) -> Listing:
    """Instructions of the kernel in `ptx` and of the functions that it calls, as one listing: registers, parameters and
    results bear the number of their function, the kernel's none. Inline assembly is read like the rest."""
    paths = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.MULTILINE))
    found = {head: _parse_function(body, paths) for head, body in _FUNCTION.findall(ptx)}
    heads = sorted(found, key=lambda head: ".entry" not in head)
    names = {_NAME.findall(head)[0]: number for number, head in enumerate(heads)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    entries = []
    for number, head in enumerate(heads):
        one = found[head]
        start = len(instructions)
        entries.append(start)
        labels |= {label: start + at for label, at in one.labels.items()}
        texts = _linked([instruction.text for instruction in one.instructions], number, names)
        instructions += [Instruction(text, old.chain) for text, old in zip(texts, one.instructions, strict=True)]
    return Listing(instructions, labels, tuple(entries), ("", *list(names)[1:]))


def _linked(texts: list[str], number: int, names: dict[str, int]) -> list[str]:
    """The instructions of function `number` under names of their own: what a caller passes is what the callee reads."""
    own = next(name for name, its_number in names.items() if its_number == number)
    linked = [text.replace(f"[{own}_param_", f"[function_{number}_param_") if number else text for text in texts]
    linked = [text.replace("[func_retval0", f"[function_{number}_result") for text in linked]
    if number:
        linked = [
            re.sub(r"%(p|rs|rd|r)(\d+)\b", lambda match: f"%{match[1]}{number}{match[2]:0>7}", text) for text in linked
        ]
    for at, text in enumerate(linked):
        if text.startswith("call"):
            called = names[next(name for name in re.findall(r"[\w$]+", text) if name in names)]
            linked[at] = f"call function_{called};"
            for before in range(at - 1, -1, -1):
                if linked[before].startswith("call"):
                    break
                if linked[before].startswith("st.param"):  # other instructions may stand between
                    linked[before] = linked[before].replace("[param", f"[function_{called}_param_")
            after = at + 1
            while after < len(linked) and not linked[after].startswith("call"):  # a result need not be read at once
                linked[after] = linked[after].replace("[retval0", f"[function_{called}_result")
                after += 1
    return linked


def parse_functions(ptx: str) -> list[Listing]:
    """Instructions of the kernel in `ptx` and of every function that it calls."""
    paths = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.MULTILINE))
    return [_parse_function(body, paths) for body in re.findall(r"^{$(.*?)^}$", ptx, re.MULTILINE | re.DOTALL)]


def _parse_function(body: str, paths: dict[str, str]) -> Listing:
    chains: dict[tuple[str, ...], Chain] = {}  # of each place as last seen: the caller's comes before the callee's
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    chain: Chain = ()
    for line in body.splitlines():
        if label := _PTX_LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif place := _PTX_LOC.search(line):
            here, caller = place.groups()[:3], place.groups()[3:]
            chain = chains[here] = (Place(paths[here[0]], int(here[1])), *chains.get(caller, ()))
        elif _PTX_OPCODE.match(text := line.split("//")[0].strip()):
            instructions.append(Instruction(text, chain))
    return Listing(instructions, labels)


def parse_sass(sass: str) -> Listing:
    """Instructions of `nvdisasm -c -hex -gi` with their scheduling bits (sm_70 and later: 128 bits each)."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    places: list[Place] = []
    entries, names = [0], [""]
    inlined = False
    for line in sass.splitlines():
        if function := _SASS_FUNCTION.match(line):
            entries.append(len(instructions))
            names.append(function.group(1))
            places = []
        elif label := _SASS_LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif place := _SASS_PLACE.search(line):
            places = [*(places if inlined else ()), Place(place.group(1), int(place.group(2)))]
            inlined = place.group(3) is not None
        elif low := _SASS_LOW.match(line):
            instructions.append(Instruction(low.group(1), tuple(places)))
        elif (high := _SASS_HIGH.match(line)) and instructions:
            last = instructions[-1]
            instructions[-1] = Instruction(last.text, last.chain, int(high.group(1), 16) >> 41)
    return Listing(instructions, labels, tuple(entries), tuple(names))


@cache
def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


@cache
def _functions(path: str) -> list[tuple[str, int, int]]:
    """(name, first line, last line) of every function of a file, decorators included."""
    tree = ast.parse("\n".join(_lines(path)))
    return [
        (node.name, min([node.lineno, *(mark.lineno for mark in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
