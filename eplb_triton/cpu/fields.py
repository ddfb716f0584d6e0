"""The fields of a policy as small integers: compiled code sees neither strings nor names."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from eplb_triton.policy import POLICIES, Corner, Exchange, Fixup, Nearest, Paired, Peak, Policy

# What is compiled, not what policy.py lists: a value that is new there must be refused here, not taken for another.
COUNTS = ("dhondt", "dispersion", "simulated", "peak_aware", "gated", "waterfill", "capped")
DONORS = ("top", "replicated")
PEAKS = ("second", "others", "exact")
TIES = ("first", "second_peak", "lexicographic")
PACKS = ("plain", "spread", "blocks")
GROUP_PACKS = ("plain", "partition")
REFINEMENTS = (type(None), Nearest, Corner, Peak, Exchange)

COUNTS_DHONDT, COUNTS_DISPERSION, COUNTS_SIMULATED, COUNTS_PEAK_AWARE, COUNTS_GATED, COUNTS_WATERFILL, COUNTS_CAPPED = (
    range(len(COUNTS))
)
MEAN_COUNTS = (COUNTS_DISPERSION, COUNTS_SIMULATED)  # their length needs a mean over all rows of the call
DONORS_TOP, DONORS_REPLICATED = range(len(DONORS))
PEAK_SECOND, PEAK_OTHERS, PEAK_EXACT = range(len(PEAKS))
TIE_FIRST, TIE_SECOND_PEAK, TIE_LEXICOGRAPHIC = range(len(TIES))
PACK_PLAIN, PACK_SPREAD, PACK_BLOCKS = range(len(PACKS))
GROUP_PLAIN, GROUP_PARTITION = range(len(GROUP_PACKS))
REFINE_NONE, REFINE_NEAREST, REFINE_CORNER, REFINE_PEAK, REFINE_EXCHANGE = range(len(REFINEMENTS))


class Fields(NamedTuple):
    """A policy without its name; 0 where a stage is left out."""

    counts: int
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


@cache
def fields_of(policy: Policy) -> Fields:
    """`policy` as integers.

    Raises:
        ValueError: one of its choices is not compiled.
    """
    fixup = policy.fixup if isinstance(policy.fixup, Fixup) else None
    paired = policy.fixup if isinstance(policy.fixup, Paired) else None
    exchange = policy.gpu_refine if isinstance(policy.gpu_refine, Exchange) else None
    return Fields(
        _index("counts", COUNTS, policy.counts),
        fixup.moves if fixup else 0,
        _index("fixup.donors", DONORS, fixup.donors) if fixup else 0,
        _index("fixup.peak", PEAKS, fixup.peak) if fixup else 0,
        _index("fixup.tie", TIES, fixup.tie) if fixup else 0,
        *_refinement("group_refine", policy.group_refine),
        _index("gpu_pack", PACKS, policy.gpu_pack),
        *_refinement("gpu_refine", policy.gpu_refine),
        _index("group_pack", GROUP_PACKS, policy.group_pack),
        paired.moves if paired else 0,
        paired.donors if paired else 0,
        exchange.pair_rounds if exchange else 0,
        exchange.match_rounds if exchange else 0,
        exchange.proposers if exchange else 0,
        exchange.double_steps if exchange else 0,
        exchange.candidates if exchange else 0,
    )


def name_of(fields: Fields) -> str:
    """`policy balanced`, the first of those that these fields are of: for people, stages never see it."""
    names = [name for name, policy in POLICIES.items() if fields_of(policy) == fields]
    return f"policy {names[0]}" if names else "a policy"


def _refinement(name: str, refine: Nearest | Corner | Peak | Exchange | None) -> tuple[int, int, int]:
    """The rule, its steps and its light packs."""
    rule = _index(name, REFINEMENTS, type(refine))
    return rule, getattr(refine, "steps", 0), getattr(refine, "lights", 0)


def _index(name: str, choices: tuple[object, ...], value: object) -> int:
    if value not in choices:
        raise ValueError(f"backend='cpu' cannot plan with policy.{name}={value!r}, must be one of {choices}")
    return choices.index(value)
