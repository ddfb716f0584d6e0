"""The backends that run on this machine's CPU: what one of them is tested for, all are."""

from __future__ import annotations

CPU_BACKENDS = ["reference", "cpu"]
