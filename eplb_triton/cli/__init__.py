"""The command line, `eplb-triton`. The packages it needs (click, rich, matplotlib) are the extra `cli`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

NAME = "eplb-triton"
INSTALL = "pip install 'eplb-triton[cli]'"
INSTALL_BOUND = "pip install 'eplb-triton[bound]'"
INSTALL_CPU = "pip install 'eplb-triton[cpu]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 an invalid plan or two that differ, 2 anything that could not
    be used, 130 interrupted, 141 the reader of the output has gone.

    Args:
        arguments: the words after the program's name; by default those of the process.

    What goes wrong is one line on stderr.
    """
    if sys.stderr is None:  # closed by `2>&-`
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        print(f"{NAME}: cannot write to stdout: it is closed", file=sys.stderr)
        return 2
    try:
        from eplb_triton.cli.program import run  # noqa: PLC0415 - the extra may be missing

        return run(sys.argv[1:] if arguments is None else list(arguments))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("click", "rich"):
            raise
        print(f"{NAME}: the command line needs {package}: {INSTALL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return 130
