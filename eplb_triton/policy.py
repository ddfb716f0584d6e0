"""Policy: the choice made at every stage of a plan, as data. No stage ever sees a policy's name."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
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
        _count(self, "moves", 1)
        _one_of("Fixup.donors", self.donors, get_args(Donors))
        _one_of("Fixup.peak", self.peak, get_args(PeakEstimate))
        _one_of("Fixup.tie", self.tie, get_args(Tie))


@dataclass(frozen=True)
class Nearest:
    """Swap the pair of items that best levels the heaviest pack with one of the `lights` lightest."""

    steps: int
    lights: int

    def __post_init__(self) -> None:
        _count(self, "steps", 1)
        _count(self, "lights", 1)
        _one_of("Nearest.lights", self.lights, (1, 2))


@dataclass(frozen=True)
class Corner:
    """Swap one of the two heaviest items of the heaviest pack with one of the two lightest of a light pack,
    or both with both."""

    steps: int

    def __post_init__(self) -> None:
        _count(self, "steps", 1)


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
        _count(self, "moves", 1)
        _count(self, "donors", 1)


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
            _count(self, name, 0)
        _count(self, "proposers", 1)


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
        _count(self, "samples", 1)
        if self.samples > MOST_SAMPLES:
            raise ValueError(f"Replan.samples={self.samples!r} must be at most {MOST_SAMPLES}")
        _count(self, "moves", 1)
        _count(self, "fresh_moves", 0)
        _count(self, "norm", 2)
        _one_of("Replan.norm", self.norm, (2, 4, 8, 16, 32))
        if self.z is not None and not isinstance(self.z, (int, float)):
            raise TypeError(f"Replan.z={self.z!r} must be a number or None, not {type(self.z).__name__}")
        if self.z is not None and not 0 <= self.z <= MOST_Z:
            raise ValueError(f"Replan.z={self.z!r} must be 0 to {MOST_Z:g}, or None")


MOST_SAMPLES = 32  # a GPU's loads squared, summed and times the samples stay below 2**53, which a float64 carries
MOST_Z = 8.0  # a chance of 1 in 10**15; scores below 2**30 * 8 keep their quotients within an int64


@dataclass(frozen=True)
class Policy:
    """What each stage does, in the order of the stages.

    Args:
        name: what users call it; the stages do not see it.
        group_pack: how groups are packed onto nodes; `partition` finds the best way.
        group_refine: swaps of groups between nodes after packing them, or None.
        counts: how replicas are assigned to experts: `dhondt`, or what takes over from it for the last of them;
            `capped` is D'Hondt with no more replicas of an expert than there are GPUs; `waterfill` begins with a
            common level.
        fixup: moves of single replicas afterwards, or None.
        gpu_pack: how replicas are packed onto the GPUs of a node; `spread` avoids GPUs that hold the expert; `blocks`
            fills one slot of all GPUs at a time and never doubles an expert on a GPU that `capped` counts can spare it.
        gpu_refine: swaps of replicas between the GPUs of a node, or None.
        replan: plan from the placement in force by moves that pay; the stages above then make the fresh plan that such
            a search begins with where nothing is in force. None: the stages above are the plan.

    Raises:
        TypeError: a field holds something of another type than it lists.
        ValueError: a field is none of the values its type lists; `Paired` without `capped` counts, or `Fixup` with
            them; `Exchange` without `blocks`, both of which work in fixed point, or another refinement with them;
            `replan` with stages other than the fresh plan's.
    """

    name: str
    group_pack: GroupPack = "plain"
    group_refine: Nearest | Corner | None = None
    counts: Counts = "dhondt"
    fixup: Fixup | Paired | None = None
    gpu_pack: GpuPack = "plain"
    gpu_refine: Nearest | Corner | Peak | Exchange | None = None
    replan: Replan | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Policy.name={self.name!r} must be a str, not {type(self.name).__name__}")
        _one_of("Policy.counts", self.counts, get_args(Counts))
        _one_of("Policy.gpu_pack", self.gpu_pack, get_args(GpuPack))
        _one_of("Policy.group_pack", self.group_pack, get_args(GroupPack))
        _stage("Policy.group_refine", self.group_refine, (Nearest, Corner))
        _stage("Policy.fixup", self.fixup, (Fixup, Paired))
        _stage("Policy.gpu_refine", self.gpu_refine, (Nearest, Corner, Peak, Exchange))
        _stage("Policy.replan", self.replan, (Replan,))
        if self.counts == "capped" and isinstance(self.fixup, Fixup):
            raise ValueError(f"Policy.fixup={self.fixup!r} must be Paired or None with counts='capped'")
        if self.counts != "capped" and isinstance(self.fixup, Paired):
            raise ValueError(f"Policy.fixup={self.fixup!r} must be Fixup or None with counts={self.counts!r}")
        if self.gpu_refine is not None and isinstance(self.gpu_refine, Exchange) != (self.gpu_pack == "blocks"):
            needed = "Exchange or None" if self.gpu_pack == "blocks" else "Nearest, Corner, Peak or None"
            raise ValueError(f"Policy.gpu_refine={self.gpu_refine!r} must be {needed} with gpu_pack={self.gpu_pack!r}")
        if self.replan is not None:
            self._check_fresh_plan()

    def _check_fresh_plan(self) -> None:
        """Replanning makes its fresh plan in one way: `partition`, `capped` counts, `blocks`, then its own swaps."""
        needed = {
            "group_pack": "partition",
            "group_refine": None,
            "counts": "capped",
            "fixup": None,
            "gpu_pack": "blocks",
            "gpu_refine": None,
        }
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(f"Policy.{name}={getattr(self, name)!r} must be {value!r} with replan={self.replan!r}")


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _count(stage: object, field: str, least: int) -> None:
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


def _stage(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """A field that holds a stage's choice, or None."""
    if value is not None and not isinstance(value, kinds):
        words = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}={value!r} must be one of {words} or None, not {type(value).__name__}")


_BALANCED = Policy(
    "balanced",
    counts="capped",
    fixup=Paired(moves=4, donors=4),
    group_pack="partition",
    gpu_pack="blocks",
    gpu_refine=Exchange(pair_rounds=3, match_rounds=8, proposers=3, double_steps=6, candidates=2048),
)

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("deepseek"),
        Policy(
            "adaptive_tail_and_2x2_fixup",
            counts="dispersion",
            fixup=Fixup(moves=1, donors="top", peak="second", tie="first"),
            group_refine=Nearest(steps=1, lights=1),
            gpu_refine=Nearest(steps=2, lights=1),
        ),
        Policy(
            "adaptive_tail_and_fixup",
            counts="peak_aware",
            fixup=Fixup(moves=1, donors="top", peak="others", tie="first"),
            group_refine=Nearest(steps=1, lights=1),
            gpu_refine=Nearest(steps=2, lights=1),
        ),
        Policy(
            "top2_tail_adaptive_and_second_light_refine",
            counts="simulated",
            fixup=Fixup(moves=1, donors="top", peak="second", tie="first"),
            group_refine=Nearest(steps=1, lights=2),
            gpu_refine=Nearest(steps=2, lights=2),
        ),
        Policy(
            "adaptive_tail_and_packer_2x2",
            counts="gated",
            fixup=Fixup(moves=2, donors="top", peak="others", tie="second_peak"),
            group_refine=Corner(steps=1),
            gpu_refine=Corner(steps=2),
        ),
        Policy(
            "hybrid_tail_waterfill",
            counts="waterfill",
            fixup=Fixup(moves=1, donors="replicated", peak="exact", tie="lexicographic"),
            gpu_pack="spread",
            gpu_refine=Peak(),
        ),
        _BALANCED,
        Policy("steady", group_pack="partition", counts="capped", gpu_pack="blocks", replan=Replan()),
    )
}
"""Every policy by name. `deepseek` is the published baseline; the next five are published improvements of it;
`balanced` plans at the lower bound; `steady` plans for the loads to come, from the placement in force."""

EFFORTS: dict[str, Policy] = {
    "low": replace(_BALANCED, name="balanced_low", gpu_refine=Exchange(pair_rounds=3, match_rounds=0)),
    "medium": _BALANCED,
    "high": replace(
        _BALANCED,
        name="balanced_high",
        gpu_refine=Exchange(pair_rounds=3, match_rounds=64, double_steps=64, candidates=1 << 17),
    ),
}
"""`balanced` with fewer and with more steps, by effort. Their names are policy names too: `balanced_low` and
`balanced_high`."""

DEFAULT_REPLAN_POLICY = "steady"
"""What `plan` uses where no policy is named and a placement is in force."""

DEFAULT_POLICY = "balanced"
"""What `plan` and the command line use where no policy is named; `rebalance_experts` is DeepSeek's function and uses
DeepSeek's policy."""


def named_policies() -> dict[str, Policy]:
    """Every policy that has a name, by it: `POLICIES`, then those of `EFFORTS` that are not among them."""
    return POLICIES | {effort.name: effort for effort in EFFORTS.values() if effort.name not in POLICIES}


def resolve_policy(policy: str | Policy) -> Policy:
    """The Policy named by `policy`, a name of `POLICIES` or of a policy of `EFFORTS`, or `policy` itself.

    Raises:
        TypeError: `policy` is neither.
        ValueError: no policy has that name.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy is a {type(policy).__name__}, must be a name or a Policy: policy={DEFAULT_POLICY!r}")
    found = POLICIES.get(policy) or named_policies().get(policy)
    if found is None:
        raise ValueError(f"policy={policy!r} is unknown, must be one of {', '.join(named_policies())}")
    return found
