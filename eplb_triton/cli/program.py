"""The program: its commands, and how one ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import click

from eplb_triton import __version__
from eplb_triton.cli.comparing import compare_command, demo_command
from eplb_triton.cli.planning import check_command, plan_command, score_command

NAME = "eplb-triton"


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Plan which GPU holds which replica of which expert, from recorded loads.

    LOADS is a .npy, .npz, .pt, .json or .csv file of loads [layers, experts] or [steps, layers, experts], of routed
    expert ids topk_ids [tokens, layers, k], or SGLang's dump of expert statistics.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (plan_command, compare_command, score_command, check_command, demo_command):
    commands.add_command(command)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status. What goes wrong is told on stderr in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        status = commands.main(list(arguments), prog_name=NAME, standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else NAME
        return _told(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except click.ClickException as error:
        return _told(error.format_message(), error.exit_code)
    except click.Abort:
        return _told("interrupted", 130)  # as shells report SIGINT
    except OSError as error:  # files have errors of their own: this is stdout, on a full disk for example
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered would fail again at exit
        return _told(f"cannot write to stdout: {error.strerror or error}", 2)
    return status if isinstance(status, int) else 0


def _told(message: str, status: int) -> int:
    print(f"{NAME}: {' '.join(message.splitlines())}", file=sys.stderr)
    return status
