"""Choices: what a policy's stages may be told, as data, each checked when it is made."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal, get_args

Counts = Literal["dhondt", "dispersion", "simulated", "peak_aware", "gated", "waterfill", "capped"]
Donors = Literal["top", "replicated"]
PeakEstimate = Literal["second", "others", "exact"]
Tie = Literal["first", "second_peak", "lexicographic"]
GroupPack = Literal["plain", "partition"]
GpuPack = Literal["plain", "spread", "blocks"]


@dataclass(frozen=True)
class Fixup:
    """Move single replicas between experts after replication.

    Args:
        moves: rounds, at most one move each.
        donors: `top` = the two experts of largest w/c; `replicated` = among those of more than one replica.
        peak: how the largest w/c after a move is judged.
        tie: which of two candidates of equal peak is taken.
    """

    moves: int
    donors: Donors
    peak: PeakEstimate
    tie: Tie

    def __post_init__(self) -> None:
        count_of(self, "moves", 1)
        one_of("Fixup.donors", self.donors, get_args(Donors))
        one_of("Fixup.peak", self.peak, get_args(PeakEstimate))
        one_of("Fixup.tie", self.tie, get_args(Tie))


@dataclass(frozen=True)
class Nearest:
    """Swap the pair of items that best levels the heaviest pack with one of the `lights` lightest."""

    steps: int
    lights: int

    def __post_init__(self) -> None:
        count_of(self, "steps", 1)
        count_of(self, "lights", 1)
        one_of("Nearest.lights", self.lights, (1, 2))


@dataclass(frozen=True)
class Corner:
    """Swap one of the two heaviest items of the heaviest pack with one of the two lightest of a light pack,
    or both with both."""

    steps: int

    def __post_init__(self) -> None:
        count_of(self, "steps", 1)


@dataclass(frozen=True)
class Peak:
    """One swap between the two heaviest and the three lightest packs, judged on all pack loads."""


@dataclass(frozen=True)
class Paired:
    """Move single replicas where GPUs have two slots, judged on the largest load of the best pairing.

    Args:
        moves: at most so many.
        donors: experts tried as givers at each move, the smallest w/(c - 1) first.
    """

    moves: int
    donors: int

    def __post_init__(self) -> None:
        count_of(self, "moves", 1)
        count_of(self, "donors", 1)


@dataclass(frozen=True)
class Exchange:
    """Exchange replicas between heavy and light GPUs, never bringing an expert to a GPU that holds it.

    Args:
        pair_rounds: rounds in which every GPU of the heavier half meets one of the lighter half.
        match_rounds: at most so many rounds in which the heaviest GPUs look for the best partner of all.
        proposers: how many of the heaviest GPUs do so.
        double_steps: at most so many steps that also exchange two replicas for two; 0: none.
        candidates: pairs of pairs that such a step may try: it meets the lightest GPUs only, candidates / C(S, 2)**2
            of them, and is left out where that is below 1.
    """

    pair_rounds: int
    match_rounds: int
    proposers: int = 3
    double_steps: int = 0
    candidates: int = 2048

    def __post_init__(self) -> None:
        for name in ("pair_rounds", "match_rounds", "double_steps", "candidates"):
            count_of(self, name, 0)
        count_of(self, "proposers", 1)


@dataclass(frozen=True)
class Replan:
    """Plan for the loads to come: from the placement in force, by moves that pay, judged on sampled steps.

    Args:
        samples: steps of the history that a placement is judged on, at most.
        moves: swaps of two slots or rewritings of one, at most; a plan that takes all of them is compared with a fresh
            one.
        fresh_moves: swaps that improve a fresh plan, at most.
        norm: of the GPUs' scores: the power mean that stands for their maximum, a power of 2.
        z: standard deviations above the mean that a GPU's score counts; None: by the number of GPUs, see `score_z`.

    Raises:
        TypeError: a field of another type.
        ValueError: a field outside its range.
    """

    samples: int = 32
    moves: int = 64
    fresh_moves: int = 128
    norm: int = 16
    z: float | None = None

    def __post_init__(self) -> None:
        for name, least in {"samples": 1, "moves": 1, "fresh_moves": 0, "norm": 2}.items():
            count_of(self, name, least)
        if self.samples > MOST_SAMPLES:
            raise ValueError(f"Replan.samples={self.samples!r} must be at most {MOST_SAMPLES}")
        one_of("Replan.norm", self.norm, (2, 4, 8, 16, 32))
        if self.z is not None and not isinstance(self.z, (int, float)):
            raise TypeError(f"Replan.z={self.z!r} must be a number or None, not {type(self.z).__name__}")
        if self.z is not None and not 0 <= self.z <= MOST_Z:
            raise ValueError(f"Replan.z={self.z!r} must be 0 to {MOST_Z:g}, or None")


MOST_SAMPLES = 32  # a GPU's loads squared, summed and times the samples stay below 2**53, which a float64 carries
MOST_Z = 8.0  # a chance of 1 in 10**15; scores below 2**30 * 8 keep their quotients within an int64


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def count_of(stage: object, field: str, least: int) -> None:
    """Make a field of a stage a Python int of at least `least` (NumPy integers pass, bool and float do not)."""
    name, value = f"{type(stage).__name__}.{field}", getattr(stage, field)
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer of at least {least}, not {type(value).__name__}")
    if count < least:
        raise ValueError(f"{name}={count} must be at least {least}")
    object.__setattr__(stage, field, count)


def stage_of(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """A field that holds a stage's choice, or None."""
    if value is not None and not isinstance(value, kinds):
        words = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}={value!r} must be one of {words} or None, not {type(value).__name__}")
