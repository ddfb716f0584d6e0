"""The fields of a policy as small integers: compiled code sees neither strings nor names."""

from __future__ import annotations

from typing import NamedTuple, get_args

from eplb_triton.policy import (
    Corner,
    Donors,
    Exchange,
    Fixup,
    GpuPack,
    GroupPack,
    Nearest,
    Paired,
    Peak,
    PeakEstimate,
    Policy,
    Tail,
    Tie,
)

TAIL_NONE, TAIL_DISPERSION, TAIL_SIMULATED, TAIL_PEAK_AWARE, TAIL_GATED, TAIL_WATERFILL, TAIL_CAPPED = range(7)
MEAN_TAILS = (TAIL_DISPERSION, TAIL_SIMULATED)  # their length needs a mean over all rows of the call
DONORS_TOP, DONORS_REPLICATED = range(2)
PEAK_SECOND, PEAK_OTHERS, PEAK_EXACT = range(3)
TIE_FIRST, TIE_SECOND_PEAK, TIE_LEXICOGRAPHIC = range(3)
PACK_PLAIN, PACK_SPREAD, PACK_BLOCKS = range(3)
GROUP_PLAIN, GROUP_PARTITION = range(2)
REFINE_NONE, REFINE_NEAREST, REFINE_CORNER, REFINE_PEAK, REFINE_EXCHANGE = range(5)


class Fields(NamedTuple):
    """A policy without its name; 0 where a stage is left out."""

    tail: int
    moves: int
    donors: int
    peak: int
    tie: int
    group_refine: int
    group_steps: int
    group_lights: int
    gpu_pack: int
    gpu_refine: int
    gpu_steps: int
    gpu_lights: int
    group_pack: int
    paired_moves: int
    paired_donors: int
    pair_rounds: int
    match_rounds: int
    proposers: int
    double_steps: int
    candidates: int


def fields_of(policy: Policy) -> Fields:
    """`policy` as integers, in the order in which policy.py lists the values of each field."""
    fixup = policy.fixup if isinstance(policy.fixup, Fixup) else None
    paired = policy.fixup if isinstance(policy.fixup, Paired) else None
    exchange = policy.gpu_refine if isinstance(policy.gpu_refine, Exchange) else None
    return Fields(
        get_args(Tail).index(policy.tail),
        fixup.moves if fixup else 0,
        get_args(Donors).index(fixup.donors) if fixup else 0,
        get_args(PeakEstimate).index(fixup.peak) if fixup else 0,
        get_args(Tie).index(fixup.tie) if fixup else 0,
        *_refinement(policy.group_refine),
        get_args(GpuPack).index(policy.gpu_pack),
        *_refinement(policy.gpu_refine),
        get_args(GroupPack).index(policy.group_pack),
        paired.moves if paired else 0,
        paired.donors if paired else 0,
        exchange.pair_rounds if exchange else 0,
        exchange.match_rounds if exchange else 0,
        exchange.proposers if exchange else 0,
        exchange.double_steps if exchange else 0,
        exchange.candidates if exchange else 0,
    )


def _refinement(refine: Nearest | Corner | Peak | Exchange | None) -> tuple[int, int, int]:
    """The rule, its steps and its light packs."""
    if isinstance(refine, Nearest):
        return REFINE_NEAREST, refine.steps, refine.lights
    if isinstance(refine, Corner):
        return REFINE_CORNER, refine.steps, 0
    if isinstance(refine, Exchange):
        return REFINE_EXCHANGE, 0, 0
    return (REFINE_PEAK, 0, 0) if refine else (REFINE_NONE, 0, 0)
