"""Programs of tests that need a process of their own."""

from __future__ import annotations

import subprocess
import sys


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
