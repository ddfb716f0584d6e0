"""How long one warp takes to issue a run of SASS: ptxas's own stall counts and scoreboards, assumed latencies."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ptx.listing import Instruction

# Cycles from issue until the scoreboard of an instruction clears. Assumed: the hardware publishes none of them.
# REDUX and SHFL 24, an L1 hit 36 (every load is taken for one; the first touch of a line costs 300 to 800); an atomic
# that returns what was there goes to L2.
LATENCY = {
    "SHFL": 24, "REDUX": 24, "CREDUX": 24, "LDG": 36, "LDS": 26, "LDSM": 30, "MUFU": 20, "S2R": 25, "S2UR": 25,
    "R2UR": 10, "BAR": 22, "VOTE": 12, "VOTEU": 12, "LDC": 30, "ULDC": 12, "LDCU": 20, "POPC": 16, "FLO": 16,
    "I2F": 16, "I2FP": 5, "F2I": 16, "F2F": 16, "STG": 8, "STS": 8, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16,
    "MEMBAR": 100, "ATOMG": 300,
}  # fmt: skip
_OTHER = 16
_SOURCES_READ = 10  # cycles until an instruction has read its registers, for those that others may then overwrite
_ROUNDS = 8  # rounds of a loop that are simulated; the second half is measured


def straight(instructions: Sequence[Instruction]) -> float:
    """Cycles of one pass, from the first issue until every result is there."""
    clock, boards = _issue(instructions, 0.0, [0.0] * 6)
    return max(clock, *boards)


def each_round(instructions: Sequence[Instruction]) -> float:
    """Cycles of a round of a loop, once it runs steadily."""
    clock, boards, marks = 0.0, [0.0] * 6, []
    for _ in range(_ROUNDS):
        clock, boards = _issue(instructions, clock, boards)
        marks.append(clock)
    half = _ROUNDS // 2
    return (marks[-1] - marks[half - 1]) / half


def _issue(instructions: Sequence[Instruction], clock: float, boards: list[float]) -> tuple[float, list[float]]:
    """Issue in order; returns the clock and when each of the six scoreboards clears."""
    boards = list(boards)
    for instruction in instructions:
        control = instruction.control
        stall, writes, reads, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        clock = max([clock, *(boards[board] for board in range(6) if waits >> board & 1)])
        kind = instruction.opcode.split(".")[0]
        if writes < 6:
            boards[writes] = max(boards[writes], clock + LATENCY.get(kind, _OTHER))
        if reads < 6:
            boards[reads] = max(boards[reads], clock + _SOURCES_READ)
        clock += max(1, stall, LATENCY["BAR"] if kind == "BAR" else 0)
    return clock, boards
