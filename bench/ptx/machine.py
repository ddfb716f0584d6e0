"""Threads, registers and control flow: one program (a block of threads) at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx.listing import Instruction, Listing, parse_ptx
from bench.ptx.memory import Array, Memory, OutOfBoundsError, RaceError
from bench.ptx.operands import constant, split_operands, state_spaces
from bench.ptx.operations import ATOMIC, DTYPES, Operand, compute, reduce_warps, shuffle

_SHARED_BYTES = 1 << 17
_MOST_BLOCKS = 3_000_000
Step = Callable[[Array], None]


class UnsupportedError(Exception):
    """An instruction that is not modelled here."""


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


class Machine:
    """Runs the kernel of a PTX text for one program after the other.

    Args:
        ptx: with line information.
        num_warps: of a program.

    `counts`: how often each instruction was run, by any thread, over all runs.
    """

    def __init__(self, ptx: str, num_warps: int) -> None:
        self.listing: Listing = parse_ptx(ptx)
        self.threads = 32 * num_warps
        self.counts = np.zeros(len(self.listing.instructions), np.int64)
        self._registers: dict[str, Array] = {}
        self._parameters: dict[str, int] = {}
        self._specials: dict[str, Any] = {"%tid.x": np.arange(self.threads), "%ctaid.x": 0, "%ctaid.y": 0}
        self._block_of = {block.start: number for number, block in enumerate(self.listing.blocks)}
        self._meetings = _meetings(self.listing)
        self._memory = Memory(0, self.threads)
        self._shared = Memory(0, self.threads)
        self._function = np.searchsorted(self.listing.entries, np.arange(len(self.listing.instructions)), "right") - 1
        self._return_to = np.zeros((len(self.listing.entries), self.threads), np.int64)  # block after the last call
        self._passed: dict[str, Array] = {}  # bytes [threads, 256] of parameters and results of functions
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
        self._memory, self._shared = memory, Memory(_SHARED_BYTES, self.threads)
        self._shared.own_all()
        memory.barrier()  # other programs come before or after this one, in any order: not checked here
        self._parameters = {f"param_{at}": value for at, value in enumerate(arguments)}
        self._specials["%ctaid.x"], self._specials["%ctaid.y"] = program
        for register in self._registers.values():
            register.view(np.uint8)[...] = 0xCD
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
        register = self._register(found.group(2), np.dtype(bool))
        return ~register if found.group(1) else register

    def _register(self, name: str, dtype: np.dtype[Any]) -> Array:
        size = {"%p": 1, "%rs": 2, "%r": 4, "%rd": 8}[re.sub(r"\d+$", "", name)]
        buffer = self._registers.setdefault(name, np.zeros(self.threads, f"u{size}"))
        return buffer.view(dtype) if dtype.itemsize == size else buffer

    def _operand(self, text: str, dtype: np.dtype[Any]) -> Operand:
        """A function that gives the operand's value in every thread."""
        if text.startswith("%") and text not in self._specials:
            register = self._register(text, dtype)
            if register.dtype.itemsize != dtype.itemsize:  # a narrower use of a register
                return lambda: register.astype(f"u{dtype.itemsize}").view(dtype)
            return lambda: register
        if text in self._specials:
            return lambda: np.broadcast_to(self._specials[text], self.threads).astype(dtype)
        if text == "global_smem":
            return lambda: np.zeros(self.threads, dtype)
        literal = np.broadcast_to(constant(text, dtype), self.threads)
        return lambda: literal

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
            return self._access(parts, operands)
        if parts[0] in ("atom", "red"):
            return self._atomic(parts, operands)
        if parts[0] == "mov" and ("{" in operands[0] or "{" in operands[1]):
            return self._move_parts(operands)
        if parts[0] in ("shfl", "redux"):
            return self._between_threads(parts, operands)
        try:
            result, types, function = compute(parts)
        except KeyError:
            raise UnsupportedError(instruction.text) from None
        sources = [self._operand(operand, kind) for operand, kind in zip(operands[1:], types, strict=True)]
        destination = self._register(operands[0].split("|")[0], result)
        held = np.dtype(f"{result.kind}{destination.itemsize}")  # a narrower result is extended by its sign, if any

        def step(mask: Array) -> None:
            value = function(*(source() for source in sources)).astype(result, copy=False)
            np.copyto(destination, value.astype(held, copy=False).view(destination.dtype), where=mask)

        return step

    def _barrier(self, *, warp: bool) -> Step:
        def step(mask: Array) -> None:
            if warp or self.threads == 32:
                self._together(mask)
                warps = np.flatnonzero(mask.reshape(-1, 32).all(1))
                self._memory.warp_barrier(warps)
                self._shared.warp_barrier(warps)
            if not warp:
                if not mask.all():
                    raise RaceError("is a barrier that only some threads reach")
                self._memory.barrier()
                self._shared.barrier()

        return step

    @staticmethod
    def _together(mask: Array) -> None:
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise RaceError("is for whole warps, and only some threads reach it")

    def _between_threads(self, parts: list[str], operands: list[str]) -> Step:
        kind = DTYPES[parts[-1]]
        source = self._operand(operands[1], kind)
        destination = self._register(operands[0].split("|")[0], kind)
        if parts[0] == "shfl":
            lane = self._operand(operands[2], DTYPES["s32"])

        def step(mask: Array) -> None:
            self._together(mask)
            value = shuffle(parts[2], source(), lane()) if parts[0] == "shfl" else reduce_warps(parts[2], source())
            np.copyto(destination, value, where=mask)

        return step

    def _move_parts(self, operands: list[str]) -> Step:
        """mov between a register and two of half its size."""
        if "{" in operands[0]:
            halves = split_operands(operands[0].strip("{} "))
            size = 8 if "%rd" in operands[1] else 4
            source = self._operand(operands[1], np.dtype(f"u{size}"))
            targets = [self._register(name, np.dtype(f"u{size // 2}")) if name != "_" else None for name in halves]

            def split(mask: Array) -> None:
                both = np.ascontiguousarray(source()).view(f"u{size // 2}").reshape(-1, 2)
                for at, target in enumerate(targets):
                    if target is not None:
                        np.copyto(target, both[:, at], where=mask)

            return split
        names = split_operands(operands[1].strip("{} "))
        size = 8 if "%rd" in operands[0] else 4
        sources = [self._operand(name, np.dtype(f"u{size // 2}")) for name in names]
        whole = self._register(operands[0], np.dtype(f"u{size}"))

        def join(mask: Array) -> None:
            both = np.stack([half() for half in sources], 1)
            np.copyto(whole, np.ascontiguousarray(both).view(f"u{size}").reshape(-1), where=mask)

        return join

    def _access(self, parts: list[str], operands: list[str]) -> Step:
        if parts[0] == "ldmatrix":
            return self._load_matrices(operands)
        if parts[0] == "stmatrix":
            return self._store_matrices(operands)
        if "param" in parts and any("function_" in operand for operand in operands):
            return self._pass(parts, operands)
        if "param" in parts:
            name = re.search(r"param_\d+", operands[1])
            kind = DTYPES[parts[-1]]
            destination = self._register(operands[0], kind)
            assert name

            def parameter(mask: Array) -> None:
                value = np.array(self._parameters[name.group(0)]).astype(kind)
                np.copyto(destination, np.broadcast_to(value, self.threads).astype(destination.dtype), where=mask)

            return parameter
        shared, kind = "shared" in state_spaces(parts), DTYPES[parts[-1]]
        address_text, data_text = (operands[1], operands[0]) if parts[0] == "ld" else (operands[0], operands[1])
        address = self._address(address_text, shared=shared)
        names = split_operands(data_text.strip("{} "))
        size = kind.itemsize * len(names)
        unsigned = np.dtype(f"u{kind.itemsize}")
        if parts[0] == "ld":
            targets = [self._register(name, kind) for name in names]

            def load(mask: Array) -> None:
                threads = np.flatnonzero(mask)
                if len(threads):
                    found = (self._shared if shared else self._memory).load(threads, address()[threads], size)
                    values = np.ascontiguousarray(found).view(kind).reshape(len(threads), -1)
                    for at, target in enumerate(targets):
                        target[threads] = values[:, at].astype(target.dtype)

            return load
        sources = [self._operand(name, unsigned) for name in names]

        def store(mask: Array) -> None:
            threads = np.flatnonzero(mask)
            if len(threads):
                values = np.stack([source()[threads] for source in sources], 1)
                place = address()[threads]
                (self._shared if shared else self._memory).store(
                    threads, place, np.ascontiguousarray(values).view(np.uint8)
                )

        return store

    def _pass(self, parts: list[str], operands: list[str]) -> Step:
        """ld and st of a function's parameter or result, which every thread has of its own."""
        place, data = (operands[1], operands[0]) if parts[0] == "ld" else (operands[0], operands[1])
        name, _, offset = place.strip("[] ").partition("+")
        held = self._passed.setdefault(name, np.zeros((self.threads, 256), np.uint8))
        kind, start = DTYPES[parts[-1]], int(offset or "0", 0)
        names = split_operands(data.strip("{} "))
        of_each = [slice(start + at * kind.itemsize, start + (at + 1) * kind.itemsize) for at in range(len(names))]
        if parts[0] == "ld":
            targets = [self._register(name, kind) for name in names]

            def load(mask: Array) -> None:
                for target, bytes_of in zip(targets, of_each, strict=True):
                    value = np.ascontiguousarray(held[:, bytes_of]).view(kind).reshape(-1)
                    np.copyto(target, value.astype(target.dtype), where=mask)

            return load
        sources = [self._operand(name, np.dtype(f"u{kind.itemsize}")) for name in names]

        def store(mask: Array) -> None:
            for source, bytes_of in zip(sources, of_each, strict=True):
                value = np.ascontiguousarray(source()).view(np.uint8).reshape(self.threads, -1)
                held[mask, bytes_of] = value[mask]

        return store

    def _atomic(self, parts: list[str], operands: list[str]) -> Step:
        """atom and, without the old value, red: 32-bit integers in global memory."""
        kind, function = DTYPES[parts[-1]], ATOMIC[parts[-2]]
        if "global" not in parts or kind.itemsize != 4:
            raise UnsupportedError(".".join(parts))
        destination = self._register(operands.pop(0), kind) if parts[0] == "atom" else None
        address, source = self._address(operands[0], shared=False), self._operand(operands[1], kind)

        def step(mask: Array) -> None:
            threads = np.flatnonzero(mask)
            before = self._memory.atomic(threads, address()[threads], function, source()[threads])
            if destination is not None:
                destination[threads] = before

        return step

    def _load_matrices(self, operands: list[str]) -> Step:
        """ldmatrix x4: lane 8m + r gives the address of row r of matrix m; lane t gets word t % 4 of row t // 4."""
        targets = [self._register(name, DTYPES["b32"]) for name in split_operands(operands[0].strip("{} "))]
        address = self._address(operands[1], shared=True)

        def step(mask: Array) -> None:
            self._together(mask)
            threads = np.flatnonzero(mask)
            rows = self._shared.load(threads, address()[threads], 16).view(np.uint32).reshape(-1, 4, 8, 4)
            for at, target in enumerate(targets):
                target[threads] = rows[:, at].reshape(-1)

        return step

    def _store_matrices(self, operands: list[str]) -> Step:
        """stmatrix: the other way round, of 1, 2 or 4 matrices; lanes beyond their rows give no address."""
        sources = [self._operand(name, DTYPES["b32"]) for name in split_operands(operands[1].strip("{} "))]
        address = self._address(operands[0], shared=True)

        def step(mask: Array) -> None:
            self._together(mask)
            threads = np.flatnonzero(mask)
            rows = np.stack([source()[threads].reshape(-1, 8, 4) for source in sources], 1)
            givers = threads[threads % 32 < 8 * len(sources)]
            self._shared.store(givers, address()[givers], rows.reshape(-1, 4).astype(np.uint32).view(np.uint8))

        return step

    def _address(self, text: str, *, shared: bool) -> Callable[[], Array]:
        base, _, offset = text.strip("[] ").partition("+")
        start = self._operand(base.strip(), DTYPES["s32" if shared and "%rd" not in base else "s64"])
        distance = int(offset, 0) if offset.strip() else 0
        return lambda: start().astype(np.int64) + distance
