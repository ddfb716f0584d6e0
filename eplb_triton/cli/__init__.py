"""The command line, `eplb-triton`. The packages it needs (click, rich, matplotlib) are the extra `cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INSTALL = "pip install 'eplb-triton[cli]'"
INSTALL_BOUND = "pip install 'eplb-triton[bound]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 an invalid plan, 2 anything that could not be used.

    Args:
        arguments: the words after the program's name; by default those of the process.

    What goes wrong is one line on stderr.
    """
    try:
        from eplb_triton.cli.program import run  # noqa: PLC0415 - the extra may be missing
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("click", "rich"):
            raise
        print(f"eplb-triton: the command line needs {package}: {INSTALL}", file=sys.stderr)
        return 2
    return run(sys.argv[1:] if arguments is None else list(arguments))
