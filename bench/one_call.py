"""One plan of every policy, for a tool that watches the device: compute-sanitizer, ncu.

compute-sanitizer --tool memcheck python -m bench.one_call
"""

from __future__ import annotations

import sys

import torch

from bench.gpu_shapes import MODELS, V3
from eplb_triton import POLICIES
from eplb_triton.kernels.launcher import launch
from eplb_triton.testing.families import loads


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: nothing was called", file=sys.stderr)
        return 1
    for case, want_log2phy in ((V3, True), (MODELS["v3-global"], False)):  # as compiled by bench.gpu_timing before
        weight = loads("continuous", 0, 2, case.experts).cuda()  # two layers: a watched program is slow
        for policy in POLICIES.values():
            launch(weight, case.topology, policy, want_log2phy=want_log2phy)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
