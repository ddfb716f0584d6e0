"""What threads do with addresses: loads and stores of memory, parameters and matrices, and atomic operations."""

from __future__ import annotations

import re

import numpy as np

from bench.ptx.memory import Array
from bench.ptx.operands import split_operands, state_spaces
from bench.ptx.operations import ATOMIC, DTYPES
from bench.ptx.registers import Registers, Step, UnsupportedError, together


def access(state: Registers, parts: list[str], operands: list[str]) -> Step:
    if parts[0] == "ldmatrix":
        return _load_matrices(state, operands)
    if parts[0] == "stmatrix":
        return _store_matrices(state, operands)
    if "param" in parts and any("function_" in operand for operand in operands):
        return _pass(state, parts, operands)
    if "param" in parts:
        name = re.search(r"param_\d+", operands[1])
        kind = DTYPES[parts[-1]]
        destination = state.register(operands[0], kind)
        assert name

        def parameter(mask: Array) -> None:
            value = np.array(state.parameters[name.group(0)]).astype(kind)
            np.copyto(destination, np.broadcast_to(value, state.threads).astype(destination.dtype), where=mask)

        return parameter
    shared, kind = "shared" in state_spaces(parts), DTYPES[parts[-1]]
    address_text, data_text = (operands[1], operands[0]) if parts[0] == "ld" else (operands[0], operands[1])
    address = state.address(address_text, shared=shared)
    names = split_operands(data_text.strip("{} "))
    size = kind.itemsize * len(names)
    unsigned = np.dtype(f"u{kind.itemsize}")
    if parts[0] == "ld":
        targets = [state.register(name, kind) for name in names]

        def load(mask: Array) -> None:
            threads = np.flatnonzero(mask)
            if len(threads):
                found = (state.shared if shared else state.memory).load(threads, address()[threads], size)
                values = np.ascontiguousarray(found).view(kind).reshape(len(threads), -1)
                for at, target in enumerate(targets):
                    target[threads] = values[:, at].astype(target.dtype)

        return load
    sources = [state.operand(name, unsigned) for name in names]

    def store(mask: Array) -> None:
        threads = np.flatnonzero(mask)
        if len(threads):
            values = np.stack([source()[threads] for source in sources], 1)
            place = address()[threads]
            (state.shared if shared else state.memory).store(
                threads, place, np.ascontiguousarray(values).view(np.uint8)
            )

    return store


def _pass(state: Registers, parts: list[str], operands: list[str]) -> Step:
    """ld and st of a function's parameter or result, which every thread has of its own."""
    place, data = (operands[1], operands[0]) if parts[0] == "ld" else (operands[0], operands[1])
    name, _, offset = place.strip("[] ").partition("+")
    held = state.passed.setdefault(name, np.zeros((state.threads, 256), np.uint8))
    kind, start = DTYPES[parts[-1]], int(offset or "0", 0)
    names = split_operands(data.strip("{} "))
    of_each = [slice(start + at * kind.itemsize, start + (at + 1) * kind.itemsize) for at in range(len(names))]
    if parts[0] == "ld":
        targets = [state.register(name, kind) for name in names]

        def load(mask: Array) -> None:
            for target, bytes_of in zip(targets, of_each, strict=True):
                value = np.ascontiguousarray(held[:, bytes_of]).view(kind).reshape(-1)
                np.copyto(target, value.astype(target.dtype), where=mask)

        return load
    sources = [state.operand(name, np.dtype(f"u{kind.itemsize}")) for name in names]

    def store(mask: Array) -> None:
        for source, bytes_of in zip(sources, of_each, strict=True):
            value = np.ascontiguousarray(source()).view(np.uint8).reshape(state.threads, -1)
            held[mask, bytes_of] = value[mask]

    return store


def atomic(state: Registers, parts: list[str], operands: list[str]) -> Step:
    """atom and, without the old value, red: 32-bit integers in global memory."""
    kind, function = DTYPES[parts[-1]], ATOMIC[parts[-2]]
    if "global" not in parts or kind.itemsize != 4:
        raise UnsupportedError(".".join(parts))
    destination = state.register(operands.pop(0), kind) if parts[0] == "atom" else None
    address, source = state.address(operands[0], shared=False), state.operand(operands[1], kind)

    def step(mask: Array) -> None:
        threads = np.flatnonzero(mask)
        before = state.memory.atomic(threads, address()[threads], function, source()[threads])
        if destination is not None:
            destination[threads] = before

    return step


def _load_matrices(state: Registers, operands: list[str]) -> Step:
    """ldmatrix x4: lane 8m + r gives the address of row r of matrix m; lane t gets word t % 4 of row t // 4."""
    targets = [state.register(name, DTYPES["b32"]) for name in split_operands(operands[0].strip("{} "))]
    address = state.address(operands[1], shared=True)

    def step(mask: Array) -> None:
        together(mask)
        threads = np.flatnonzero(mask)
        rows = state.shared.load(threads, address()[threads], 16).view(np.uint32).reshape(-1, 4, 8, 4)
        for at, target in enumerate(targets):
            target[threads] = rows[:, at].reshape(-1)

    return step


def _store_matrices(state: Registers, operands: list[str]) -> Step:
    """stmatrix: the other way round, of 1, 2 or 4 matrices; lanes beyond their rows give no address."""
    sources = [state.operand(name, DTYPES["b32"]) for name in split_operands(operands[1].strip("{} "))]
    address = state.address(operands[0], shared=True)

    def step(mask: Array) -> None:
        together(mask)
        threads = np.flatnonzero(mask)
        rows = np.stack([source()[threads].reshape(-1, 8, 4) for source in sources], 1)
        givers = threads[threads % 32 < 8 * len(sources)]
        state.shared.store(givers, address()[givers], rows.reshape(-1, 4).astype(np.uint32).view(np.uint8))

    return step
