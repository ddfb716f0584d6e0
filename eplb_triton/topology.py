"""Topology: the counts of a cluster, checked once, with the derived sizes as properties."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields

HINT_STEPS = 4096  # exact for every size that is planned for; 2 ms
"""How far from what was given an error looks for what would do."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How many replicas a layer gets and which hardware holds them.

    Args:
        num_replicas: P, physical experts of one layer over all GPUs.
        num_gpus: D, GPUs over all nodes.
        num_groups: G, expert groups of one layer.
        num_nodes: N, nodes.

    Planning is hierarchical when `num_groups` is a multiple of `num_nodes` (each group then stays on one
    node), else global (groups and nodes are ignored).

    Raises:
        TypeError: a count is no integer.
        ValueError: a count is below 1; `num_replicas` is no multiple of `num_gpus`; in hierarchical
            planning `num_gpus` is no multiple of `num_nodes`.
    """

    num_replicas: int
    num_gpus: int
    num_groups: int = 1
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _count(field.name, getattr(self, field.name)))
        if self.num_replicas % self.num_gpus:
            raise ValueError(
                f"num_replicas={self.num_replicas} must be a multiple of num_gpus={self.num_gpus}; "
                f"{_nearest_multiples(self.num_replicas, self.num_gpus)}"
            )
        if self.hierarchical and self.num_gpus % self.num_nodes:
            fit = _near_divisor(self.num_replicas, self.num_nodes, self.num_gpus)
            hint = (
                f"the nearest that also divides num_replicas={self.num_replicas} is {fit}"
                if fit
                else _nearest_multiples(self.num_gpus, self.num_nodes)
            )
            raise ValueError(
                f"num_gpus={self.num_gpus} must be a multiple of num_nodes={self.num_nodes} in hierarchical "
                f"planning (num_groups={self.num_groups} is a multiple of num_nodes); {hint}"
            )

    def check_experts(self, num_experts: int) -> None:
        """Refuse a number of logical experts per layer, E, that this topology cannot hold.

        Raises:
            ValueError: E is 0; P < E; in hierarchical planning E is no multiple of `num_groups`.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1: loads are [layers, experts]")
        if self.num_replicas < num_experts:
            enough = -(-num_experts // self.num_gpus) * self.num_gpus
            raise ValueError(
                f"num_replicas={self.num_replicas} must be at least num_experts={num_experts}, one replica each; "
                f"the nearest that num_gpus={self.num_gpus} divides is {enough}"
            )
        if self.hierarchical and num_experts % self.num_groups:
            fit = _near_divisor(num_experts, self.num_nodes, self.num_groups)
            hint = (
                f"the nearest num_groups that would do is {fit}"
                if fit
                else f"no num_groups does with num_nodes={self.num_nodes}; num_groups=1, num_nodes=1 plans globally"
            )
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={num_experts} in hierarchical planning; {hint}"
            )

    def map_shapes(
        self, num_layers: int, num_experts: int, *, log2phy: bool | int = True
    ) -> dict[str, tuple[int, ...]]:
        """The shape of every map of a plan, by the map's name: where shapes are asked for, they come from here.

        Args:
            num_layers: L.
            num_experts: E.
            log2phy: whether to name `log2phy` too: False, True for its full width, or a width.

        Returns:
            `phy2log` and `phyrank` [L, P], `logcnt` and `classes` [L, E], `bad` [L, N], `log2phy` [L, E, width].

        Raises:
            ValueError: E does not fit, there are less than 0 layers, or the width is below 1.
        """
        if num_layers < 0:
            raise ValueError(f"num_layers={num_layers} must be at least 0")
        self.check_experts(num_experts)
        shapes: dict[str, tuple[int, ...]] = {
            "phy2log": (num_layers, self.num_replicas),
            "phyrank": (num_layers, self.num_replicas),
            "logcnt": (num_layers, num_experts),
            "bad": (num_layers, self.planned_nodes),
            "classes": (num_layers, num_experts),
        }
        if log2phy is not False:
            width = self.log2phy_width(num_experts) if log2phy is True else _count("log2phy", log2phy)
            shapes["log2phy"] = (num_layers, num_experts, width)
        return shapes

    def log2phy_width(self, num_experts: int) -> int:
        """P - E + 1, the most replicas that one of E experts can have."""
        return self.num_replicas - num_experts + 1

    @property
    def hierarchical(self) -> bool:
        """Whether the groups can be split evenly over the nodes, and so are kept whole on one node."""
        return self.num_groups % self.num_nodes == 0

    @property
    def planned_groups(self) -> int:
        """G as the planner sees it: 1 in global planning."""
        return self.num_groups if self.hierarchical else 1

    @property
    def planned_nodes(self) -> int:
        """N as the planner sees it: 1 in global planning."""
        return self.num_nodes if self.hierarchical else 1

    @property
    def slots_per_gpu(self) -> int:
        """S = P / D: slot k is on GPU k // S."""
        return self.num_replicas // self.num_gpus

    @property
    def replicas_per_node(self) -> int:
        """p = P / N, replicas of one row (of a planned node)."""
        return self.num_replicas // self.planned_nodes

    @property
    def gpus_per_node(self) -> int:
        """d = D / N, GPUs of one row (of a planned node)."""
        return self.num_gpus // self.planned_nodes


def check_topology(topology: object) -> None:
    """Refuse what is no Topology.

    Raises:
        TypeError: names what came.
    """
    if not isinstance(topology, Topology):
        raise TypeError(
            f"topology is a {type(topology).__name__}, must be a Topology: Topology(num_replicas=..., num_gpus=...)"
        )


def _count(name: str, value: object) -> int:
    """`value` as a Python int of at least 1 (NumPy integers pass, bool and float do not)."""
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer of at least 1, not bool")
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer of at least 1, not {type(value).__name__}") from None
    if count < 1:
        raise ValueError(f"{name}={count} must be at least 1; the nearest that would do is 1")
    return count


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"the nearest are {below} and {above}" if below else f"the nearest is {above}"


def _near_divisor(value: int, of: int, near: int) -> int | None:
    """The multiple of `of` nearest to `near` that divides `value`, ties: the lower; None if there is none. Where
    the `HINT_STEPS` nearest on each side have none, the lowest: counts from a file may be of any size."""
    if value % of:
        return None
    lower, upper = near // of * of, -(-near // of) * of
    for step in range(HINT_STEPS):
        sides = sorted((lower - step * of, upper + step * of), key=lambda fit: (abs(fit - near), fit))
        for fit in sides:
            if 0 < fit <= value and value % fit == 0:
                return fit
    return of
