"""Options that several commands share. Nothing here imports PyTorch: `--help` takes a tenth of a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.policy import DEFAULT_POLICY, named_policies
from eplb_triton.topology import Topology

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

# 256 times the largest size planned for; a slip of the keyboard beyond it would only run out of memory.
MAX_COUNT = 2**20

# As `plan` and `write_plan` take them; a test compares.
BACKENDS = ("auto", "triton", "cpu", "reference")
PLAN_SUFFIXES = (".npz", ".pt", ".json")


@dataclass(frozen=True)
class LoadsFile:
    """LOADS, and what the user said about how to read it."""

    path: Path
    key: str | None
    kind: Literal["loads", "topk_ids"] | None
    num_experts: int | None = None


def loads_argument(command: Command) -> Command:
    """LOADS, --key and --kind, as `loads`: a LoadsFile."""

    @click.argument("loads", type=click.Path(path_type=Path))
    @click.option("--key", metavar="NAME", help="Name of the array, where the file has several.")
    @click.option(
        "--kind",
        type=click.Choice(["loads", "topk_ids"]),
        help="What a 3-D array is: loads [steps, layers, experts] or topk_ids [tokens, layers, k]. "
        "Default: topk_ids if the array, or the file it is alone in, is called so.",
    )
    @functools.wraps(command)
    def wrapped(loads: Path, key: str | None, kind: Literal["loads", "topk_ids"] | None, **others: Any) -> Any:
        return command(loads=LoadsFile(loads, key, kind, others.pop("experts", None)), **others)

    return wrapped


experts_option: Decorator = click.option(
    "--experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Experts per layer. Default: as the loads have it; for a topk_ids trace, the largest id + 1.",
)


def topology_options(command: Command) -> Command:
    """--replicas, --gpus, --nodes and --groups, as `topology`: a Topology."""

    @click.option("--replicas", type=int, required=True, metavar="P", help="Physical experts per layer.")
    @click.option("--gpus", type=int, required=True, metavar="D", help="GPUs over all nodes.")
    @click.option("--nodes", type=int, default=1, show_default=True, metavar="N", help="Nodes.")
    @click.option("--groups", type=int, default=1, show_default=True, metavar="G", help="Expert groups per layer.")
    @functools.wraps(command)
    def wrapped(replicas: int, gpus: int, nodes: int, groups: int, **others: Any) -> Any:
        for option, count in (("replicas", replicas), ("gpus", gpus), ("nodes", nodes), ("groups", groups)):
            if count > MAX_COUNT:
                raise Refused(f"--{option} {count} must be at most {MAX_COUNT}")
        with refusing():
            topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
        return command(topology=topology, **others)

    return wrapped


policy_option: Decorator = click.option(
    "--policy",
    type=click.Choice(list(named_policies())),
    metavar="NAME",
    default=DEFAULT_POLICY,
    show_default=True,
    help=f"One of {', '.join(named_policies())}.",
)

backend_option: Decorator = click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What computes the plans."
)

pairing_option: Decorator = click.option(
    "--pairing-bound",
    "pairing",
    is_flag=True,
    help="With two slots a GPU, judge by the stronger lower bound that pairs replicas: about 0.6 s a layer of 256 "
    "experts; needs SciPy. It is the same bound with other numbers of slots.",
)

plot_option: Decorator = click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw GPU loads before and after, and balancedness per layer: .png, .svg or .pdf.",
)


def window_option(meaning: str) -> Decorator:
    """--window, which each command uses in its own way."""
    return click.option("--window", type=click.IntRange(min=1), metavar="W", help=meaning)
