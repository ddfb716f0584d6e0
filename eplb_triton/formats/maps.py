"""Placement files of every format: which one a file is, and the writer of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eplb_triton.formats import sglang_location, tensorrt_llm, vllm, vllm_ascend
from eplb_triton.formats.arrays import NAMELESS, read_named
from eplb_triton.formats.atomic import check_writable
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.plans import PLAN_SUFFIXES, PlanFile, read_plan, write_plan
from eplb_triton.formats.slot_map import SlotMap
from eplb_triton.placement import Placement

EXPECTED = (
    "a plan of `eplb-triton plan` (.npz, .pt, .json), SGLang's expert location (.json, .pt), vLLM's [layers][slots] "
    "(.json), a vllm-ascend expert map (.json) or TensorRT-LLM's load balancer config (.yaml)"
)
SUFFIXES_OF: dict[str, tuple[str, ...]] = {
    "plan": PLAN_SUFFIXES,
    sglang_location.NAME: sglang_location.SUFFIXES,
    vllm.NAME: vllm.SUFFIXES,
    vllm_ascend.NAME: vllm_ascend.SUFFIXES,
    tensorrt_llm.NAME: tensorrt_llm.SUFFIXES,
}
"""Formats by name, and how the names of their files end."""

NEED_GPUS = ("plan", vllm_ascend.NAME)
"""Formats that say which slots are on a GPU."""


def read_map(path: Path, num_experts: int | None = None) -> PlanFile | SlotMap:
    """Read a placement file of any format, recognised by its suffix and the names in it.

    Args:
        path: the file.
        num_experts: E, where the file does not say; None: its largest expert + 1.

    Raises:
        FormatError: no format has such a file, or the one that it is refuses it.
    """
    suffix = path.suffix.lower()
    if suffix in tensorrt_llm.SUFFIXES:
        return tensorrt_llm.read(path, num_experts)
    if suffix == ".npz":
        return read_plan(path)
    content = read_named(path, (".json", ".pt"), EXPECTED, lambda names: [] if "phy2log" in names else names)
    if not content:
        return read_plan(path)
    if NAMELESS in content and suffix == ".json":
        return vllm.from_content(path, content, num_experts)
    if sglang_location.KEY in content:
        return sglang_location.from_content(path, content, num_experts)
    if vllm_ascend.KEYS[1] in content:
        return vllm_ascend.from_content(path, content, num_experts)
    if "logical_count" in content:
        raise FormatError(
            path, EXPECTED, "logical_count, which are loads and no placement: `eplb-triton plan` takes them"
        )
    listed = ", ".join(name for name in list(content)[:12] if name) or "one array without a name"
    raise FormatError(path, EXPECTED, listed)


def check_map_path(path: Path, to: str) -> None:
    """Refuse a path that `write_map` could not write to, before any work is done.

    Raises:
        FormatError: another suffix than the format has, or see `check_writable`.
    """
    if path.suffix.lower() not in SUFFIXES_OF[to]:
        found = f"a name that ends in {path.suffix or 'no suffix'!r}"
        raise FormatError(path, f"an output file that ends in {', '.join(SUFFIXES_OF[to])} for {to}", found)
    check_writable(path)


def write_map(path: Path, placement: Placement, to: str, *, first_layer: int = 0) -> None:
    """Write a placement in the format named `to`, whole or not at all.

    Args:
        path: where; its suffix is one of the format's.
        placement: what; checked here, since no framework does.
        to: a name of `SUFFIXES_OF`.
        first_layer: number of its first layer in the model, for `tensorrt-llm`.

    Raises:
        FormatError: the path, or the format cannot express the placement.
        ValueError: the placement is invalid: which layer and slot break which rule.
    """
    check_map_path(path, to)
    placement.validate()
    writers: dict[str, Callable[[], None]] = {
        "plan": lambda: write_plan(path, placement),
        sglang_location.NAME: lambda: sglang_location.write(path, placement),
        vllm.NAME: lambda: vllm.write(path, placement),
        vllm_ascend.NAME: lambda: vllm_ascend.write(path, placement),
        tensorrt_llm.NAME: lambda: tensorrt_llm.write(path, placement, first_layer),
    }
    writers[to]()
