"""Options that several commands share. Nothing here imports PyTorch: `--help` takes a tenth of a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.policy import DEFAULT_POLICY, DEFAULT_REPLAN_POLICY, named_policies
from eplb_triton.printing import shown
from eplb_triton.topology import Topology

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

# 256 times the largest size planned for; a slip of the keyboard beyond it would only run out of memory.
MAX_COUNT = 2**20

# As `plan`, `write_plan` and `write_map` take them; a test compares.
BACKENDS = ("auto", "triton", "cpu", "reference")
EXAMPLE = Path(__file__).parent / "example.npz"
"""The last 1,536 of `serving_steps(2136, 3, 32, mixed=True, tokens_per_step=1024, top_k=4, seed=11)`."""
PLAN_SUFFIXES = (".npz", ".pt", ".json")
FORMATS = ("plan", "sglang", "vllm", "vllm-ascend", "tensorrt-llm")


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


def traces_argument(command: Command) -> Command:
    """TRACE…, --key, --kind, --experts and --step-tokens, as `traces`: LoadsFiles, and `step_tokens`."""

    @click.argument("traces", metavar="TRACE...", nargs=-1, required=True, type=click.Path(path_type=Path))
    @click.option("--key", metavar="NAME", help="Name of the array, where a file has several.")
    @click.option(
        "--kind",
        type=click.Choice(["loads", "topk_ids"]),
        help="What a 3-D array is; default: as its name, or that of its file, says.",
    )
    @experts_option
    @click.option(
        "--step-tokens",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        metavar="T",
        help="Consecutive tokens of a routing trace that are a step.",
    )
    @functools.wraps(command)
    def wrapped(
        traces: tuple[Path, ...], key: str | None, kind: Literal["loads", "topk_ids"] | None, **others: Any
    ) -> Any:
        experts = others.pop("experts")
        return command(traces=[LoadsFile(path, key, kind, experts) for path in traces], **others)

    return wrapped


def deployment_options(command: Command) -> Command:
    """The cluster, what a plan looks back on, and what steps and moves cost."""
    for option in reversed(
        (
            click.option("--gpus", type=int, required=True, metavar="D", help="GPUs over all nodes."),
            click.option("--nodes", type=int, metavar="N", help="Nodes. Default: 1."),
            click.option("--groups", type=int, metavar="G", help="Expert groups per layer. Default: 1."),
            click.option(
                "--window",
                type=click.IntRange(min=1),
                metavar="W",
                help="Steps that a plan looks back on. Default: 1024; of a policy that replans the interval, or 256.",
            ),
            click.option(
                "--slot-bytes", type=float, metavar="B", help="Weights of an expert in a layer. Default: DeepSeek-V3's."
            ),
            click.option(
                "--bandwidth",
                type=float,
                metavar="B/S",
                help="Bytes a second at which slots are written. Default: 900e9.",
            ),
            click.option(
                "--layer-time",
                type=float,
                metavar="SECONDS",
                help="Of an expert layer in a step, were all GPUs loaded alike. Default: from the tokens of a step.",
            ),
        )
    ):
        command = option(command)
    return command


experts_option: Decorator = click.option(
    "--experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Experts per layer. Default: as the loads have it; for a topk_ids trace, the largest id + 1.",
)


@dataclass(frozen=True)
class Counts:
    """The counts of a topology as far as the user gave them."""

    replicas: int | None
    gpus: int | None
    nodes: int | None
    groups: int | None

    def topology(self) -> Topology:
        """With one node and one group where nothing was said, or a refusal."""
        for option in ("replicas", "gpus"):
            if getattr(self, option) is None:
                raise Refused(f"Missing option '--{option}'.")
        for option, count in vars(self).items():
            if count is not None and count > MAX_COUNT:
                raise Refused(f"--{option} {count} must be at most {MAX_COUNT}")
        with refusing():
            return Topology(
                num_replicas=self.replicas or 0,
                num_gpus=self.gpus or 0,
                num_groups=1 if self.groups is None else self.groups,
                num_nodes=1 if self.nodes is None else self.nodes,
            )

    def of(self, topology: Topology, path: Path) -> Topology:
        """The topology of the plan in a file; a refusal where something else was given."""
        for option, count in vars(self).items():
            if count not in (None, stored := getattr(topology, f"num_{option}")):
                raise Refused(f"--{option} {count} must be {stored} or left out, as in {shown(path)}")
        return topology


def count_options(command: Command) -> Command:
    """--replicas, --gpus, --nodes and --groups, as `counts`: Counts."""

    @click.option("--replicas", type=int, metavar="P", help="Physical experts per layer.")
    @click.option("--gpus", type=int, metavar="D", help="GPUs over all nodes.")
    @click.option("--nodes", type=int, metavar="N", help="Nodes. Default: 1.")
    @click.option("--groups", type=int, metavar="G", help="Expert groups per layer. Default: 1.")
    @functools.wraps(command)
    def wrapped(replicas: int | None, gpus: int | None, nodes: int | None, groups: int | None, **others: Any) -> Any:
        return command(counts=Counts(replicas, gpus, nodes, groups), **others)

    return wrapped


def topology_options(command: Command) -> Command:
    """--replicas, --gpus, --nodes and --groups, as `topology`: a Topology."""

    @count_options
    @functools.wraps(command)
    def wrapped(counts: Counts, **others: Any) -> Any:
        return command(topology=counts.topology(), **others)

    return wrapped


policy_option: Decorator = click.option(
    "--policy",
    type=click.Choice(list(named_policies())),
    metavar="NAME",
    help=f"One of {', '.join(named_policies())}. Default: {DEFAULT_REPLAN_POLICY} with --previous, else "
    f"{DEFAULT_POLICY}.",
)


def policies_option(text: str) -> Decorator:
    """`--policy`, any number of times, as `policies`; `text`: its help."""
    names = click.Choice(list(named_policies()))
    return click.option("--policy", "policies", multiple=True, type=names, metavar="NAME", help=text)


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
