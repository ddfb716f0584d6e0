"""What compiled code must and must not contain so that a GPU computes what the reference does, and fast.

Each function returns the rules that a kernel breaks, in words; none broken: an empty list.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.ptx.compiled import Compiled
from bench.ptx.listing import Instruction, Listing, functions, parse_functions
from eplb_triton.kernels.replanning_potential import _estimate_least_gain, add_product, root_near
from eplb_triton.kernels.replanning_swaps import _bound_tile, _least_power

REGISTERS = {1: 168, 4: 128, 8: 128, 16: 128}
"""Most registers a thread, by warps of the program. One warp: a few programs a multiprocessor, latency is all that
counts; 16 warps of 128 are all of a multiprocessor's registers."""
SGPR_SPILLS = 128
"""Most scalar registers kept in lanes of a vector register (AMD has 102): a move each, no memory."""
CALL_FRAME = 32
"""Most bytes of memory a thread on AMD: where a stage that calls a sort keeps the way back, and what it must restore of
the caller's registers: stored once and loaded once a call. Nothing is spilled there."""
FOR_BOUNDS = {root_near: "rsqrt.approx.ftz.f32", add_product: "fma.rn.f32"}
"""Functions whose numbers only decide what is worked out exactly, and are off by less than was allowed for; and the
instruction of PTX that each may have, of two numbers at once, too."""
ROOT_CALLERS = _bound_tile, _least_power, _estimate_least_gain
"""Where LLVM may say that the instructions of `root_near` are from, once it has made one of several."""
STEPS = ("_pick_one_by_one", "_pick_by_peak", "_pick_capped", "_place_each")
"""The serial steps: a plan is hundreds of them, one after the other."""
MAY_WAIT = {
    "_swap", "swap_items", "exceeds", "_level", "_scan", "pack_spread", "move_replicas", "owner_of_each",
    "rank_packs", "_stand", "_propose", "_largest_pair",
}  # fmt: skip
"""Functions inside loops whose lanes read what others stored, and which run a few times a plan, so that a barrier is
both needed and cheap. `pack_spread`: once an item, for the labels that a scan reads."""

_DIVISION_FMAS = 5  # v_fma and v_fmac in AMD's expansion of an IEEE division, float32 and float64 alike
_WHOLE_DIVISION = "0x4f7ffffe"  # 2^32 less a little, by which AMD's expansion of an integer division scales
_SQUARE_ROOT_FMAS = 7  # and of a float64 square root
_TO_LONG_FMAS = 1  # and of float64 to int64, which takes the upper half off, exactly; the one use of v_floor_f64


def broken_rules(kernel: Compiled, registers: int | None = None, *, stages: bool = False) -> list[str]:
    """Every rule that `kernel` breaks; `registers`: most a thread, by default what REGISTERS says; `stages`: a loop's
    stages read what earlier ones stored, so that even one warp waits at barriers."""
    if kernel.target.startswith("gfx"):
        return _in_amdgcn(kernel)
    return _in_ptx(kernel, stages) + _in_sass(kernel, registers or REGISTERS[kernel.num_warps])


def _in_ptx(kernel: Compiled, stages: bool) -> list[str]:
    listings = parse_functions(kernel.ptx)
    broken = [rule for listing in listings for rule in _inexact_in_ptx(listing)]
    if re.search(r"\.local\s+\.align", kernel.ptx):
        broken.append("local memory declared")
    if kernel.num_warps == 1:
        loops = [[listing.instructions[i] for i in loop.body] for listing in listings for loop in listing.loops]
        broken += _slow_steps(loops) + ([] if stages else _waiting_loops(loops))
    return broken


def _inexact_in_ptx(listing: Listing) -> list[str]:
    broken = []
    for instruction in listing.instructions:
        opcode = instruction.opcode
        parts = opcode.split(".")
        floating = parts[-1] in ("f16", "f32", "f64", "f16x2", "f32x2")
        allowed = {its for function, its in FOR_BOUNDS.items() if function.__name__ in functions(instruction.chain)}
        if opcode.removesuffix("x2") in allowed:
            continue
        if "approx" in parts or "full" in parts:
            broken.append(_rule("approximate arithmetic", instruction))
        if "ftz" in parts:
            broken.append(_rule("subnormals flushed to zero", instruction))
        if parts[0] in ("fma", "mad") and floating:
            broken.append(_rule("multiply and add contracted to one rounding", instruction))
        elif parts[0] in ("add", "sub", "mul", "div", "sqrt", "rcp") and floating and "rn" not in parts:
            broken.append(_rule("not said to round to nearest, so ptxas may contract it", instruction))
        if "local" in parts:
            broken.append(_rule("local memory", instruction))
    return broken


def _waiting_loops(loops: Iterable[list[Instruction]]) -> list[str]:
    """Barriers inside a loop of a one-warp kernel, but for those of MAY_WAIT; a call counts as one, it may hold any."""
    barriers = [instruction for loop in loops for instruction in loop if instruction.opcode.startswith(("bar", "call"))]
    return [
        _rule("barrier inside a serial loop", barrier)
        for barrier in barriers
        if not MAY_WAIT.intersection(functions(barrier.chain))
    ]


def _slow_steps(loops: Iterable[list[Instruction]]) -> list[str]:
    """Serial steps that do not reduce by the one instruction there is for it.

    A step's own loop has instructions of the step itself; a loop of a function that it calls (the ordered sum, whose
    additions must stay one after the other) is not one.
    """
    broken = []
    for loop in loops:
        step = {name for instruction in loop for name in functions(instruction.chain)[:1]}.intersection(STEPS)
        if step and not any(instruction.opcode.startswith("redux.sync") for instruction in loop):
            broken.append(f"no redux.sync in a loop of {', '.join(sorted(step))}")
    return broken


def _in_sass(kernel: Compiled, registers: int) -> list[str]:
    resources = kernel.resources
    broken = [f"{name} {resources[name]}, must be 0" for name in ("STACK", "LOCAL") if resources[name]]
    if resources["REG"] > registers:
        broken.append(f"{resources['REG']} registers, must be at most {registers}")
    spills = [i for i in kernel.sass_listing.instructions if i.opcode.split(".")[0] in ("LDL", "STL")]
    return broken + [_rule("register spilled to memory", instruction) for instruction in spills]


def _in_amdgcn(kernel: Compiled) -> list[str]:
    text = kernel.amdgcn
    broken = []
    for name, most in (
        ("vgpr_spill_count", 0),
        ("private_segment_fixed_size", CALL_FRAME),
        ("sgpr_spill_count", SGPR_SPILLS),
    ):
        if (found := _number(text, rf"\.{name}:\s+(\d+)")) > most:
            broken.append(f"{name} {found}, must be at most {most}")
    for name, needed in (
        ("denorm_mode_32", 3),  # keep subnormals in and out
        ("denorm_mode_16_64", 3),
        ("round_mode_32", 0),  # to nearest even
        ("round_mode_16_64", 0),
    ):
        if (found := _number(text, rf"\.amdhsa_float_{name} (\d+)")) != needed:
            broken.append(f"float_{name} {found}, must be {needed}")
    counts = Counter(re.findall(r"^\s+([sv]_\w+)", text, re.MULTILINE))
    if changes := [name for name in counts if name.startswith(("s_setreg", "s_denorm_mode", "s_round_mode"))]:
        broken.append(f"mode of arithmetic changed by {', '.join(changes)}")
    roots, products = _lines_of(root_near, *ROOT_CALLERS), _lines_of(add_product)
    for instruction, place in _places(text):
        if re.match(r"v_(rsq|sqrt)_f32", instruction) and place not in roots:
            broken.append(f"approximate root: {instruction} ({place})")
        if place in products and re.match(r"v_(pk_)?fma", instruction):
            counts[instruction.split()[0]] -= 1
    whole = len(re.findall(rf"v_mul_f32\S* .*{_WHOLE_DIVISION}", text))
    for bits in ("f32", "f64"):
        broken += _inexact_on_amd(counts, bits, whole if bits == "f32" else 0)
    return broken


def _inexact_on_amd(counts: Counter[str], bits: str, whole: int) -> list[str]:
    """Fused operations and approximate reciprocals that do not belong to an IEEE division or square root, nor to one of
    the `whole` divisions of integers, which begin with an estimate and correct it."""

    def found(*kinds: str) -> int:
        kind = re.compile(rf"v_({'|'.join(kinds)})_{bits}(_\w+)?")
        return sum(number for name, number in counts.items() if kind.fullmatch(name))

    divisions = found("div_fixup")
    roots = found("rsq") if bits == "f64" else 0
    to_long = found("floor") if bits == "f64" else 0
    expected = _DIVISION_FMAS * divisions + _SQUARE_ROOT_FMAS * roots + _TO_LONG_FMAS * to_long
    broken = []
    if (fused := found("fma", "fmac", "mad", "mac", "pk_fma", "fmamk", "fmaak")) != expected:
        broken.append(f"{fused} fused {bits} multiply-adds, must be {expected}: {divisions} divisions, {roots} roots")
    if (estimates := found("rcp", "rcp_iflag")) != divisions + whole:
        broken.append(
            f"approximate {bits} division: {estimates} reciprocals, must be one each of {divisions} divisions"
        )
    if not divisions == found("div_fmas") == found("div_scale") / 2:
        broken.append(f"incomplete expansion of a {bits} division")
    return broken


def _places(text: str) -> list[tuple[str, str]]:
    """Vector instructions, and the file and line that each is said to be from."""
    found, place = [], ""
    for line in text.splitlines():
        if loc := re.match(r"\s+\.loc\s.*;\s*(\S+?:\d+)", line):
            place = loc.group(1)
        elif re.match(r"\s+v_", line):
            found.append((line.strip(), place))
    return found


def _lines_of(*sources: Any) -> set[str]:
    """The files and lines of kernels' functions."""
    found = set()
    for source in sources:
        lines, first = inspect.getsourcelines(source.fn)
        file = Path(inspect.getsourcefile(source.fn) or "").name
        found |= {f"{file}:{number}" for number in range(first, first + len(lines))}
    return found


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"nothing in the assembly matches {pattern}")
    return int(found.group(1))


def _rule(rule: str, instruction: Instruction) -> str:
    where = " < ".join(f"{place.path.rsplit('/', 1)[-1]}:{place.line}" for place in instruction.chain)
    return f"{rule}: {instruction.text} ({where})"
