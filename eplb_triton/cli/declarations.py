"""The commands: what they take and what `--help` says of them. What they do is imported when one of them runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from eplb_triton.cli.options import (
    FORMATS,
    PLAN_SUFFIXES,
    backend_option,
    count_options,
    deployment_options,
    experts_option,
    loads_argument,
    pairing_option,
    plot_option,
    policies_option,
    policy_option,
    topology_options,
    traces_argument,
    window_option,
)

plan_argument = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))


@click.command("plan", short_help="Plan a placement for recorded loads.")
@count_options
@policy_option
@click.option(
    "--previous",
    type=click.Path(path_type=Path),
    metavar="PLAN",
    help="The plan in force: weights stay where they can, and --replicas, --gpus, --nodes and --groups are its.",
)
@click.option(
    "--price",
    type=float,
    metavar="X",
    help="What a slot written must save, as a share of the mean GPU load. Default: 0.0003.",
)
@click.option("--moves", type=click.IntRange(min=0), metavar="M", help="Slots written a layer at most. Default: any.")
@window_option("Plan for the most recent W steps (tokens of a trace). Default: all of them.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Write the plan to FILE, which ends in {', '.join(PLAN_SUFFIXES)}.",
)
@click.option(
    "--log2phy/--no-log2phy",
    default=True,
    show_default=True,
    help="Also write log2phy, which has E (P - E + 1) entries a layer.",
)
@pairing_option
@loads_argument
@experts_option
@backend_option
def plan_command(**arguments: Any) -> None:
    """Plan a placement for recorded LOADS and say what it gains, and how near it is to the best possible.

    With --previous, the loads are a history, and only slots are written that pay by their price.
    """
    _module("planning").plan_loads(**arguments)


@click.command("compare", short_help="Every policy on the same recorded loads.")
@topology_options
@window_option("Steps (tokens of a trace) of a window. Default: 1 step, 1000 tokens.")
@plot_option
@click.option("--per-layer", is_flag=True, help="Also print every policy's gap to the lower bound in every layer.")
@pairing_option
@loads_argument
@experts_option
@backend_option
def compare_command(**arguments: Any) -> None:
    """Plan every window of recorded LOADS with every policy, side by side."""
    _module("comparing").compare(**arguments)


@click.command("replay", short_help="Is it worth it on my traffic? Every planner on recorded steps.")
@traces_argument
@deployment_options
@click.option(
    "--replicas",
    type=int,
    multiple=True,
    metavar="P",
    help="Physical experts per layer; repeat it to try several. Default: a redundant slot on every GPU.",
)
@click.option(
    "--interval",
    "intervals",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Steps from the end of a deployment to the next plan; repeat it to try several. Default: 256, or an eighth of "
    "a shorter recording.",
)
@policies_option("A planner to replay; repeat it for several. Default: deepseek, balanced, steady.")
@click.option("--at-once", is_flag=True, help="Plans come into force at once. Default: a layer a step.")
@click.option(
    "--from-start",
    is_flag=True,
    help="Judge the steps before the first plan too. Default: from where the first plan is in force.",
)
@click.option("--json", "json_wanted", is_flag=True, help="Print all figures as JSON, and nothing else.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write a page with pictures to FILE, a .html that needs nothing else.",
)
@backend_option
def replay_command(**arguments: Any) -> None:
    """Replay recorded traffic, TRACE after TRACE, as a deployment would have served it: plan on the steps so far, put
    the plan in force, be judged by the steps that follow. Says what imbalance costs, and what each planner saves.

    Of a .npy or .npz only a few steps are in memory at a time.
    """
    _module("replaying").replay(**arguments)


@click.command("recommend", short_help="Which settings to run with, from recorded steps.")
@traces_argument
@deployment_options
@click.option(
    "--slots-per-gpu",
    type=click.IntRange(min=1),
    required=True,
    metavar="S",
    help="Experts of a layer that a GPU has memory for, at most.",
)
@backend_option
def recommend_command(**arguments: Any) -> None:
    """Try replicas, intervals and policies on recorded traffic, and say which to run with, and how to set that in vLLM
    and SGLang.
    """
    _module("recommending").recommend(**arguments)


@click.command("score", short_help="Judge a plan by recorded loads.")
@plan_argument
@loads_argument
@window_option("Also score every window of W steps (tokens of a trace).")
@pairing_option
def score_command(**arguments: Any) -> None:
    """Judge the plan in the file PLAN by recorded LOADS."""
    _module("planning").score(**arguments)


@click.command("check", short_help="Check a plan file.")
@plan_argument
def check_command(**arguments: Any) -> None:
    """Check the plan in the file PLAN; exit status 1 and the first fault if it is invalid."""
    _module("planning").check(**arguments)


@click.command("convert", short_help="A placement in the format of another program.")
@click.argument("path", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    required=True,
    help=f"One of {', '.join(FORMATS)}.",
)
@count_options
@experts_option
@click.option(
    "--first-layer",
    type=click.IntRange(min=0),
    metavar="K",
    help="Number of the first layer in the model, for tensorrt-llm. Default: as IN has it, else 0.",
)
def convert_command(**arguments: Any) -> None:
    """Write the placement in the file IN to the file OUT in another format. The format of IN is recognised."""
    _module("files").convert(**arguments)


@click.command("diff", short_help="What changes from one placement to another.")
@click.argument("first", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("second", metavar="PLAN", type=click.Path(path_type=Path))
@count_options
@experts_option
def diff_command(**arguments: Any) -> int:
    """Say which slots change from the first PLAN to the second, and which experts GPUs must fetch; files of any
    format. Exit status 0 if every slot holds the same expert, 1 if not.
    """
    status: int = _module("files").diff(**arguments)
    return status


@click.command("demo", short_help="Every policy on made-up loads; needs no file.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the made-up loads.")
@backend_option
@plot_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the made-up loads to FILE, a .npz for the other commands.",
)
def demo_command(**arguments: Any) -> None:
    """Plan made-up loads of a DeepSeek-V3-sized model with every policy; needs no file."""
    _module("comparing").demo(**arguments)


@click.command("doctor", short_help="What is installed, enabled and compiled; whether it works.")
@click.pass_context
def doctor_command(context: click.Context) -> None:
    """Say what is installed, enabled and compiled for vLLM and SGLang, and whether planning works here.

    Exit status 1 if something that is enabled would not work.
    """
    context.exit(_module("doctor").examine())


def _module(name: str) -> Any:
    """A module of this package that imports PyTorch, which takes a second."""
    return import_module(f"eplb_triton.cli.{name}")
