"""`python -m eplb_triton.testing FILE…`: whether a recorded case still fails, with every backend that there is."""

import sys

from eplb_triton.testing.reproducing import run_reproducer


def main(paths: list[str]) -> int:
    """0: every backend plans the bits of the reference; 1: one does not; 2: no file, or none that can be read."""
    if not paths:
        print("usage: python -m eplb_triton.testing FILE...", file=sys.stderr)
        return 2
    same = True
    for path in paths:
        try:
            lines = run_reproducer(path)
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: no reproducer: {error}", file=sys.stderr)
            return 2
        for line in lines:
            print(f"{path}: {line}")
            same &= line.startswith("recorded:") or line.endswith("the bits of reference") or "not run" in line
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
