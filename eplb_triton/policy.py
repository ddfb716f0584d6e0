"""Policy: the choice made at every stage of a plan, as data. No stage ever sees a policy's name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from eplb_triton.choices import (
    Corner,
    Counts,
    Donors,
    Exchange,
    Fixup,
    GpuPack,
    GroupPack,
    Nearest,
    Paired,
    Peak,
    PeakEstimate,
    Replan,
    Tie,
    one_of,
    stage_of,
)

__all__ = [
    "DEFAULT_POLICY",
    "DEFAULT_REPLAN_POLICY",
    "EFFORTS",
    "POLICIES",
    "Corner",
    "Counts",
    "Donors",
    "Exchange",
    "Fixup",
    "GpuPack",
    "GroupPack",
    "Nearest",
    "Paired",
    "Peak",
    "PeakEstimate",
    "Policy",
    "Replan",
    "Tie",
    "named_policies",
    "resolve_policy",
]


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
        one_of("Policy.counts", self.counts, get_args(Counts))
        one_of("Policy.gpu_pack", self.gpu_pack, get_args(GpuPack))
        one_of("Policy.group_pack", self.group_pack, get_args(GroupPack))
        stage_of("Policy.group_refine", self.group_refine, (Nearest, Corner))
        stage_of("Policy.fixup", self.fixup, (Fixup, Paired))
        stage_of("Policy.gpu_refine", self.gpu_refine, (Nearest, Corner, Peak, Exchange))
        stage_of("Policy.replan", self.replan, (Replan,))
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
