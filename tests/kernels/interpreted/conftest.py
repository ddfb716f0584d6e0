"""These tests run the kernels in Triton's interpreter, which must be chosen before the kernels are imported:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted

In a process without it they are not collected: other tests there compile the same kernels.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
