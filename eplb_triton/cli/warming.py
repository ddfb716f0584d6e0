"""`warm`: fill the compilers' caches ahead, for an image that is read-only later."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplb_triton.cli.options import policies_option
from eplb_triton.cli.refusals import Refused, refusing
from eplb_triton.policy import named_policies, resolve_policy
from eplb_triton.topology import Topology

if TYPE_CHECKING:
    from eplb_triton.policy import Policy


@click.command("warm", short_help="Compile ahead, into the compilers' caches.")
@policies_option("May be repeated. Default: all.")
@click.option("--experts", type=click.IntRange(min=1), metavar="E", help="Of the shape to compile GPU kernels for.")
@click.option("--layers", type=click.IntRange(min=1), default=1, show_default=True, metavar="L", help="Layers.")
@click.option("--replicas", type=click.IntRange(min=1), metavar="P", help="Physical experts per layer.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="D", help="GPUs over all nodes.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Nodes.")
@click.option("--groups", type=click.IntRange(min=1), default=1, show_default=True, metavar="G", help="Expert groups.")
def warm_command(
    policies: Sequence[str],
    experts: int | None,
    layers: int,
    replicas: int | None,
    gpus: int | None,
    nodes: int,
    groups: int,
) -> None:
    """Compile the planner for this CPU and, where --experts, --replicas and --gpus say for which shape, for its GPU.

    Numba's cache lies where NUMBA_CACHE_DIR says, Triton's where TRITON_CACHE_DIR says.
    """
    shape = (experts, replicas, gpus)
    if None in shape and any(count is not None for count in shape):
        raise Refused("--experts, --replicas and --gpus go together: they are the shape that GPU kernels are made for")
    chosen = [resolve_policy(name) for name in policies or named_policies()]
    compiled = _warm_cpu(chosen)
    if experts is not None and replicas is not None and gpus is not None:
        with refusing():
            topology = Topology(num_replicas=replicas, num_gpus=gpus, num_groups=groups, num_nodes=nodes)
            topology.check_experts(experts)
            compiled |= _warm_gpu(chosen, topology, layers, experts)
    if not compiled:
        raise Refused("nothing was compiled: the lines above say why")


def _warm_cpu(policies: Sequence[Policy]) -> bool:
    try:
        from eplb_triton.cpu import serve  # noqa: PLC0415 - Numba is not everywhere, and takes a second
        from eplb_triton.cpu.launcher import compile_for  # noqa: PLC0415
    except ImportError as error:
        click.echo(f"cpu: nothing compiled: {error}")
        return False
    for policy in policies:
        begin = time.perf_counter()
        folder = compile_for(policy)
        where = f"cached in {folder}" if folder else "not cached: no folder can be written"
        click.echo(f"cpu: {policy.name}: {time.perf_counter() - begin:.1f} s, {where}")
    begin = time.perf_counter()
    serve.compile_all()
    click.echo(f"cpu: splitting: {time.perf_counter() - begin:.1f} s")
    return True


def _warm_gpu(policies: Sequence[Policy], topology: Topology, layers: int, experts: int) -> bool:
    import torch  # noqa: PLC0415 - takes a second

    try:
        import triton  # noqa: F401, PLC0415 - Triton is not everywhere
    except ImportError as error:
        click.echo(f"gpu: nothing compiled: {error}")
        return False
    if not torch.cuda.is_available():
        click.echo("gpu: nothing compiled: PyTorch sees no GPU here")
        return False
    from eplb_triton.planner import Planner  # noqa: PLC0415

    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    for policy in policies:
        begin = time.perf_counter()
        Planner(topology, layers, experts, policy=policy, device="cuda")
        click.echo(f"gpu: {policy.name}: {time.perf_counter() - begin:.1f} s, cached in {folder}")
    return True
