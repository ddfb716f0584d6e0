"""Threads, registers and control flow: one program (a block of threads) at a time."""

from __future__ import annotations

import re

import numpy as np

from bench.ptx.access import access, atomic
from bench.ptx.listing import Instruction, Listing, parse_ptx
from bench.ptx.memory import Array, Memory, OutOfBoundsError, RaceError
from bench.ptx.operands import split_operands
from bench.ptx.operations import DTYPES, compute, reduce_warps, shuffle
from bench.ptx.registers import Registers, Step, UnsupportedError, together

_SHARED_BYTES = 1 << 17
_MOST_BLOCKS = 3_000_000


class FaultError(Exception):
    """A race, an access out of bounds, or threads apart where they must be together; says at which instruction."""


def _meetings(listing: Listing) -> dict[int, str]:
    """The blocks in which threads wait for one another, and who: the warp or the whole program."""
    found = {}
    for number, block in enumerate(listing.blocks):
        opcodes = [listing.instructions[at].opcode for at in block]
        if any(opcode.startswith(("bar.warp", "shfl", "redux", "ldmatrix", "stmatrix")) for opcode in opcodes):
            found[number] = "warp"
        if any(opcode.startswith("bar.sync") for opcode in opcodes):
            found[number] = "program"
    return found


class Machine(Registers):
    """Runs the kernel of a PTX text for one program after the other.

    Args:
        ptx: with line information.
        num_warps: of a program.

    `counts`: how often each instruction was run, by any thread, over all runs.
    """

    def __init__(self, ptx: str, num_warps: int) -> None:
        super().__init__(32 * num_warps)
        self.listing: Listing = parse_ptx(ptx)
        self.counts = np.zeros(len(self.listing.instructions), np.int64)
        self._block_of = {block.start: number for number, block in enumerate(self.listing.blocks)}
        self._meetings = _meetings(self.listing)
        self._function = np.searchsorted(self.listing.entries, np.arange(len(self.listing.instructions)), "right") - 1
        self._return_to = np.zeros((len(self.listing.entries), self.threads), np.int64)  # block after the last call
        self._steps = [self._compile(instruction) for instruction in self.listing.instructions]

    def run(self, memory: Memory, arguments: list[int], program: tuple[int, int]) -> None:
        """Run one program to its end.

        Args:
            memory: global memory, made for this number of threads.
            arguments: addresses and integers, in the order of the parameters.
            program: its index on the grid.

        Raises:
            FaultError: what a GPU might not forgive.
        """
        self.memory, self.shared = memory, Memory(_SHARED_BYTES, self.threads)
        self.shared.own_all()
        memory.barrier()  # other programs come before or after this one, in any order: not checked here
        self.parameters = {f"param_{at}": value for at, value in enumerate(arguments)}
        self.specials["%ctaid.x"], self.specials["%ctaid.y"] = program
        self.poison()
        blocks = self.listing.blocks
        where = np.zeros(self.threads, np.int64)
        for _ in range(_MOST_BLOCKS):
            number = self._next_block(where)
            if number == len(blocks):
                return
            active = where == number
            where[active] = number + 1
            for at in blocks[number]:
                self.counts[at] += 1
                self._step(at, active, where)
        raise FaultError(f"still running after {_MOST_BLOCKS} blocks")

    def _next_block(self, where: Array) -> int:
        """The first block that threads are at; where it has them act together, one that all of them have reached."""
        first = int(where.min())
        if first == where.max() or first not in self._meetings:
            return first
        for number in np.unique(where).tolist():
            warps = (where == number).reshape(-1, 32)
            kind = self._meetings.get(number, "")
            if not kind or (warps.all() if kind == "program" else (warps.any(1) == warps.all(1)).all()):
                return int(number)
        return first

    def _step(self, at: int, active: Array, where: Array) -> None:
        instruction = self.listing.instructions[at]
        mask = active & self._predicate(instruction) if instruction.predicated else active
        if instruction.opcode.startswith("bra"):
            target = re.findall(r"\$L__BB\w+", instruction.text)[-1]
            where[mask] = self._block_of[self.listing.labels[target]]
        elif instruction.opcode == "call":
            called = int(re.findall(r"function_(\d+)", instruction.text)[0])
            self._return_to[called, mask] = where[mask]
            where[mask] = self._block_of[self.listing.entries[called]]
        elif instruction.opcode == "ret":
            function = self._function[at]
            where[mask] = self._return_to[function, mask] if function else len(self.listing.blocks)
        else:
            try:
                with np.errstate(all="ignore"):
                    self._steps[at](mask)
            except (RaceError, OutOfBoundsError) as fault:
                places = " < ".join(f"{place.path.rsplit('/', 1)[-1]}:{place.line}" for place in instruction.chain)
                raise FaultError(f"{type(fault).__name__}: {instruction.text} {fault} ({places})") from None

    def _predicate(self, instruction: Instruction) -> Array:
        found = re.match(r"@(!?)(%p\d+)", instruction.text)
        assert found
        register = self.register(found.group(2), np.dtype(bool))
        return ~register if found.group(1) else register

    def _compile(self, instruction: Instruction) -> Step:  # noqa: PLR0911 - a kind of instruction each
        text = re.sub(r"^@!?%p\d+\s+", "", instruction.text).rstrip("; ")
        opcode, _, rest = text.partition(" ") if "\t" not in text else text.partition("\t")
        parts = opcode.strip().split(".")
        operands = split_operands(rest)
        if parts[0] in ("bra", "ret", "call"):
            return lambda mask: None
        if parts[0] == "bar":
            return self._barrier(warp=parts[1] == "warp")
        if parts[0] in ("ld", "st", "ldmatrix", "stmatrix"):
            return access(self, parts, operands)
        if parts[0] in ("atom", "red"):
            return atomic(self, parts, operands)
        if parts[0] == "mov" and ("{" in operands[0] or "{" in operands[1]):
            return self._move_parts(operands)
        if parts[0] in ("shfl", "redux"):
            return self._between_threads(parts, operands)
        try:
            result, types, function = compute(parts)
        except KeyError:
            raise UnsupportedError(instruction.text) from None
        sources = [self.operand(operand, kind) for operand, kind in zip(operands[1:], types, strict=True)]
        destination = self.register(operands[0].split("|")[0], result)
        held = np.dtype(f"{result.kind}{destination.itemsize}")  # a narrower result is extended by its sign, if any

        def step(mask: Array) -> None:
            value = function(*(source() for source in sources)).astype(result, copy=False)
            np.copyto(destination, value.astype(held, copy=False).view(destination.dtype), where=mask)

        return step

    def _barrier(self, *, warp: bool) -> Step:
        def step(mask: Array) -> None:
            if warp or self.threads == 32:
                together(mask)
                warps = np.flatnonzero(mask.reshape(-1, 32).all(1))
                self.memory.warp_barrier(warps)
                self.shared.warp_barrier(warps)
            if not warp:
                if not mask.all():
                    raise RaceError("is a barrier that only some threads reach")
                self.memory.barrier()
                self.shared.barrier()

        return step

    def _between_threads(self, parts: list[str], operands: list[str]) -> Step:
        kind = DTYPES[parts[-1]]
        source = self.operand(operands[1], kind)
        destination = self.register(operands[0].split("|")[0], kind)
        if parts[0] == "shfl":
            lane = self.operand(operands[2], DTYPES["s32"])

        def step(mask: Array) -> None:
            together(mask)
            value = shuffle(parts[2], source(), lane()) if parts[0] == "shfl" else reduce_warps(parts[2], source())
            np.copyto(destination, value, where=mask)

        return step

    def _move_parts(self, operands: list[str]) -> Step:
        """mov between a register and two of half its size."""
        if "{" in operands[0]:
            halves = split_operands(operands[0].strip("{} "))
            size = 8 if "%rd" in operands[1] else 4
            source = self.operand(operands[1], np.dtype(f"u{size}"))
            targets = [self.register(name, np.dtype(f"u{size // 2}")) if name != "_" else None for name in halves]

            def split(mask: Array) -> None:
                both = np.ascontiguousarray(source()).view(f"u{size // 2}").reshape(-1, 2)
                for at, target in enumerate(targets):
                    if target is not None:
                        np.copyto(target, both[:, at], where=mask)

            return split
        names = split_operands(operands[1].strip("{} "))
        size = 8 if "%rd" in operands[0] else 4
        sources = [self.operand(name, np.dtype(f"u{size // 2}")) for name in names]
        whole = self.register(operands[0], np.dtype(f"u{size}"))

        def join(mask: Array) -> None:
            both = np.stack([half() for half in sources], 1)
            np.copyto(whole, np.ascontiguousarray(both).view(f"u{size}").reshape(-1), where=mask)

        return join
