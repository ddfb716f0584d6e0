"""The program: its commands, and how one ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import click

from eplb_triton import __version__
from eplb_triton.cli import NAME
from eplb_triton.cli.declarations import (
    check_command,
    compare_command,
    convert_command,
    demo_command,
    diff_command,
    doctor_command,
    plan_command,
    recommend_command,
    replay_command,
    score_command,
)
from eplb_triton.cli.warming import warm_command
from eplb_triton.printing import printable

EXIT_STATUS = """\b
Exit status:
    0  done
    1  the plan is invalid (check), the plans differ (diff)
    2  something given cannot be used, or the output cannot be written
  130  interrupted
  141  the reader of the output has gone, as in `| head`"""


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_STATUS)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Plan which GPU holds which replica of which expert, from recorded loads.

    LOADS is a .npy, .npz, .pt, .json or .csv file of loads [layers, experts] or [steps, layers, experts], of routed
    expert ids topk_ids [tokens, layers, k], or a statistics dump of SGLang or TensorRT-LLM, or a folder of its ranks.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    plan_command,
    compare_command,
    replay_command,
    recommend_command,
    score_command,
    check_command,
    convert_command,
    diff_command,
    demo_command,
    doctor_command,
    warm_command,
):
    commands.add_command(command)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status. What goes wrong is told on stderr in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        status = commands.main(list(arguments), prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()  # what fails at exit is told by the interpreter, at length
    except click.ClickException as error:
        return _told(_message(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _told("interrupted", 130)  # as shells report SIGINT
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):  # which click turns into exit status 1
            raise
        return _stdout_failed(leaving.__context__)
    except OSError as error:
        return _stdout_failed(error)
    return status if isinstance(status, int) else 0


def _message(error: click.ClickException) -> str:
    if not isinstance(error, click.UsageError):
        return error.format_message()
    return f"{error.format_message()} (see {error.ctx.command_path if error.ctx else NAME} --help)"


def _stdout_failed(error: OSError) -> int:
    """Files have errors of their own, so this is stdout: on a full disk, for example, or behind `| head`."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered would fail again at exit
    if isinstance(error, BrokenPipeError):
        return 141  # as shells report SIGPIPE
    return _told(f"cannot write to {error.filename or 'stdout'}: {error.strerror or error}", 2)


def _told(message: str, status: int) -> int:
    print(f"{NAME}: {printable(message)}", file=sys.stderr)
    return status
