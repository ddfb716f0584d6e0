"""`python -m eplb_triton`: the command line."""

import sys

from eplb_triton.cli import main

if __name__ == "__main__":
    sys.exit(main())
