"""What the kernels of one policy and shape cost: of your own, on a target that need not be there.

    python -m bench.kernel --policy balanced --layers 58 --experts 256 --slots 288 --gpus 32 --nodes 4 --groups 8 --json
    python -m bench.kernel --policy splitting --experts 256 --slots 288 --gpus 32 --target gfx942

Registers, spills and shared memory are those of the kernels as they are launched. Cycles are an ESTIMATE from SASS
(NVIDIA alone, latencies assumed for sm_90; how: bench/ptx/sass_cycles.py), of the slowest of `--rows` programs on drawn
loads. Where there is a GPU the kernels are also timed on it, whatever the target: replays of a CUDA graph, warm and
cold, beside an empty kernel on the same grid, in microseconds (bench/gpu.py). A policy that replans does so from a plan
in force.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import triton

from bench.ptx.compiled import STEPS, TARGETS, Compiled, compile_plan
from bench.ptx.registers import UnsupportedError
from bench.ptx.replans import run_replan
from bench.ptx.sass_cycles import GIGAHERTZ, Estimate, cycles_of, estimate, slowest_program
from bench.ptx.serving import TYPES, compile_serving
from eplb_triton import POLICIES, Topology, plan
from eplb_triton.kernels.replanning_shapes import replan_plan
from eplb_triton.kernels.specs import launch_plan
from eplb_triton.replans import DEFAULT_PRICE
from eplb_triton.synthetic import awkward_loads
from eplb_triton.testing.models import Model

SPLITTING = "splitting"
AMD = {
    "vector_registers": "vgpr_count",
    "scalar_registers": "sgpr_count",
    "vector_spills": "vgpr_spill_count",
    "scalar_spills": "sgpr_spill_count",
    "frame_bytes": "private_segment_fixed_size",
}
"""Figures of AMD's kernels, and what their assembly calls them."""


def usage(kernel: Compiled) -> dict[str, Any]:
    """What a thread and a program of a kernel take, in words that do not depend on the target but for registers."""
    found: dict[str, Any] = {"name": kernel.name, "num_warps": kernel.num_warps, "shared_bytes": kernel.shared}
    if kernel.target.startswith("gfx"):
        return found | {name: _of_amd(kernel, entry) for name, entry in AMD.items()}
    resources = kernel.resources
    spills = [i for i in kernel.sass_listing.instructions if i.opcode.split(".")[0] in ("LDL", "STL")]
    return found | {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"],
        "local_bytes": resources["LOCAL"],
        "spill_instructions": len(spills),
        "instructions": len(kernel.sass_listing.instructions),
    }


def _of_amd(kernel: Compiled, entry: str) -> int:
    found = re.search(rf"\.{entry}:\s+(\d+)", kernel.amdgcn)
    if not found:
        raise ValueError(f"the assembly of {kernel.name} does not say its {entry}")
    return int(found.group(1))


def compiled(policy: str, model: Model, target: str, *, log2phy: bool) -> list[Compiled]:
    """The kernels as they are launched, in the order of their launches; of `splitting`, all of a serving step."""
    if policy == SPLITTING:
        sizes = {"num_replicas": model.topology.num_replicas, "num_gpus": model.topology.num_gpus}
        return [compile_serving(name, target, TYPES[name], num_experts=model.experts, **sizes) for name in TYPES]
    return list(compile_plan(model, POLICIES[policy], target, want_log2phy=log2phy))


def estimated(policy: str, model: Model, target: str, rows: int) -> list[Estimate]:
    """Of every kernel, of the slowest of `rows` programs.

    Raises:
        UnsupportedError: there is no such estimate.
    """
    if target.startswith("gfx"):
        raise UnsupportedError("cycles are estimated from SASS, which AMD's GPUs have none of")
    if policy == SPLITTING:
        raise UnsupportedError("what a serving step does depends on its tokens: tests estimate it on drawn ones")
    chosen, topology = POLICIES[policy], model.topology
    if chosen.replan:
        history = awkward_loads("continuous", 1, STEPS * rows, model.experts).view(STEPS, rows, model.experts)
        before = plan(history.sum(0), topology, policy="balanced").phy2log
        shape = replan_plan(topology, model.experts, chosen, steps=STEPS)
        (kernel,) = compile_plan(model, chosen, target, want_log2phy=False)
        each = []
        for row in range(rows):
            one = slice(row, row + 1)
            ran = run_replan(
                kernel, shape, topology, history[:, one], previous=before[one], price=DEFAULT_PRICE, moves=None
            )
            each.append([estimate(kernel, ran.machine)])
        return max(each, key=cycles_of)
    kernels = list(compile_plan(model, chosen, target, want_log2phy=False, inlined=True))
    launch = launch_plan(topology, model.experts, chosen)
    weight = awkward_loads("continuous", 1, model.layers, model.experts)
    programs = list(np.ndindex(model.layers, topology.planned_nodes))[:rows]
    return slowest_program(kernels, launch, topology, weight, programs)


def measured(policy: str, model: Model, *, log2phy: bool) -> dict[str, Any]:
    """Microseconds on the GPU of this machine.

    Raises:
        UnsupportedError: there is none, or nothing of that name to time.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("no GPU that torch can see")
    if policy == SPLITTING:
        raise UnsupportedError("splitting is timed by no tool yet: its kernels want the tokens of a step")
    from bench.gpu import bind, times_of  # noqa: PLC0415 - Triton looks for a driver

    bound = bind(model, POLICIES[policy], log2phy=log2phy)
    times = times_of(bound, bound.loads("continuous"))
    return {"gpu": torch.cuda.get_device_name(), "microseconds": times._asdict()}


def report(policy: str, model: Model, target: str, *, log2phy: bool, rows: int) -> dict[str, Any]:
    """All figures of a policy, or of `splitting`, on a shape; in place of what there is not, `not` says why."""
    found: dict[str, Any] = {
        "policy": policy,
        "shape": {"layers": model.layers, "experts": model.experts, **asdict(model.topology), "log2phy": log2phy},
        "target": target,
        "triton": triton.__version__,
        "kernels": [usage(kernel) for kernel in compiled(policy, model, target, log2phy=log2phy)],
    }

    def cycles() -> dict[str, Any]:
        kernels = estimated(policy, model, target, rows)
        total = cycles_of(kernels)
        each = [asdict(kernel) for kernel in kernels]
        return {"cycles": round(total), "us": round(total / GIGAHERTZ / 1e3, 1), "rows": rows, "kernels": each}

    found["estimated"] = _or_why(cycles) if rows else {"not": "asked for no rows"}
    found["measured"] = _or_why(lambda: measured(policy, model, log2phy=log2phy))
    return found


def _or_why(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except UnsupportedError as error:
        return {"not": str(error)}


def text(found: dict[str, Any]) -> str:
    """The figures in Markdown, without the loops of the estimate."""
    shape = ", ".join(f"{name} {value}" for name, value in found["shape"].items())
    names = list(found["kernels"][0])
    lines = [f"{found['policy']} on {found['target']}, Triton {found['triton']}: {shape}", ""]
    lines += ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    lines += ["| " + " | ".join(str(kernel[name]) for name in names) + " |" for kernel in found["kernels"]]
    estimate_of, measured_on = found["estimated"], found["measured"]
    cycles = f"{estimate_of.get('cycles')} cycles, {estimate_of.get('us')} us"
    lines += ["", "estimated: " + estimate_of.get("not", cycles)]
    times = ", ".join(f"{name} {value:.1f}" for name, value in measured_on.get("microseconds", {}).items())
    return "\n".join([*lines, "measured: " + measured_on.get("not", f"{measured_on.get('gpu')}, us: {times}")])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*POLICIES, SPLITTING]
    parser.add_argument("--policy", default="balanced", choices=known, help=", ".join(known), metavar="NAME")
    parser.add_argument("--layers", type=int, default=58, help="MoE layers")
    parser.add_argument("--experts", type=int, default=256, help="logical experts of a layer")
    parser.add_argument("--slots", type=int, default=288, help="replicas of a layer, over all GPUs")
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--groups", type=int, default=1, help="expert groups")
    parser.add_argument("--target", default="sm_90", choices=TARGETS, metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--log2phy", action="store_true", help="the kernels that fill log2phy as well")
    parser.add_argument("--rows", type=int, default=1, help="programs to estimate; the slowest counts")
    parser.add_argument("--json", action="store_true", help="everything, with every loop of the estimate")
    given = parser.parse_args(arguments)
    try:
        topology = Topology(
            num_replicas=given.slots, num_gpus=given.gpus, num_groups=given.groups, num_nodes=given.nodes
        )
        topology.check_experts(given.experts)
        most = given.layers * topology.planned_nodes
        if given.layers < 1 or not 0 <= given.rows <= most:
            raise ValueError(f"rows={given.rows} must be 0 to {most}: a row is a node of a layer")
    except ValueError as error:
        parser.error(str(error))
    model = Model(given.layers, given.experts, topology)
    found = report(given.policy, model, given.target, log2phy=given.log2phy, rows=given.rows)
    print(json.dumps(found, indent=1) if given.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
