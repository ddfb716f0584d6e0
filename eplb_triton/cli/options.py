"""Options that several commands share, and how what cannot be used is told."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eplb_triton import Topology
from eplb_triton.backends import BACKENDS
from eplb_triton.cli import INSTALL, INSTALL_BOUND
from eplb_triton.formats import Recording, check_writable, read_loads, shown
from eplb_triton.formats.loads import Kind
from eplb_triton.policy import DEFAULT_POLICY, named_policies

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

# 256 times the largest size planned for; a slip of the keyboard beyond it would only run out of memory.
MAX_COUNT = 2**20


class Refused(click.ClickException):
    """Something the user gave cannot be used."""

    exit_code = 2


@contextlib.contextmanager
def refusing(about: Path | None = None) -> Iterator[None]:
    """A ValueError inside becomes the one line that the user sees, behind the name of the file it is about."""
    try:
        yield
    except ValueError as error:
        raise Refused(f"{shown(about)}: {error}" if about else str(error)) from error


@dataclass(frozen=True)
class LoadsFile:
    """LOADS, and what the user said about how to read it."""

    path: Path
    key: str | None
    kind: Kind | None
    num_experts: int | None = None

    def read(self) -> Recording:
        """The recording, or a refusal."""
        with refusing():
            return read_loads(self.path, key=self.key, kind=self.kind, num_experts=self.num_experts)

    def read_for(self, topology: Topology) -> Recording:
        """The recording, of a number of experts that the topology can hold, or a refusal."""
        recording = self.read()
        with refusing(self.path):
            topology.check_experts(recording.num_experts)
        return recording


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
    def wrapped(loads: Path, key: str | None, kind: Kind | None, **others: Any) -> Any:
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


def check_pairing(pairing: bool, topology: Topology) -> None:
    """Refuse, before any work, a lower bound that cannot be computed here."""
    if not pairing or topology.slots_per_gpu != 2:
        return
    try:
        import eplb_triton.bound.pairing  # noqa: F401, PLC0415 - SciPy is an optional extra
    except ImportError as error:
        raise Refused(f"--pairing-bound needs SciPy: {INSTALL_BOUND}") from error


def window_option(meaning: str) -> Decorator:
    """--window, which each command uses in its own way."""
    return click.option("--window", type=click.IntRange(min=1), metavar="W", help=meaning)


def check_output(path: Path | None, suffixes: tuple[str, ...], loads: Path | None = None) -> None:
    """Refuse, before any work, an output that could not be written or would replace the loads it is made from."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        found = f"a name that ends in {path.suffix or 'no suffix'!r}"
        raise Refused(f"{shown(path)}: expected an output file that ends in {', '.join(suffixes)}; found {found}")
    with refusing():
        check_writable(path)
    if loads is not None and path.resolve() == loads.resolve():
        raise Refused(f"{shown(path)}: expected an output file of its own; found the file of loads")


def check_plot(path: Path | None, loads: Path | None = None) -> None:
    """Refuse, before any work, a plot that could not be drawn or written."""
    if path is None:
        return
    try:
        from eplb_triton.cli import plots  # noqa: PLC0415 - matplotlib takes a second to import and may be missing
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise Refused(f"--plot needs {package}: {INSTALL}") from error
    check_output(path, plots.SUFFIXES, loads)
