"""Reading recorded loads, of whatever shape and file type."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from eplb_triton.formats import sglang_passes, tensorrt_llm_statistics
from eplb_triton.formats.arrays import NAMELESS, READERS, Array, as_array, read_named
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.recordings import LoadSeries, Recording, RoutingTrace
from eplb_triton.formats.sglang import LOGICAL_COUNT, drop_idle_steps

Kind = Literal["loads", "topk_ids"]

TOPK_IDS = "topk_ids"
KNOWN_NAMES = (TOPK_IDS, LOGICAL_COUNT, sglang_passes.RECORDS, "loads", "weight")
"""Names taken without being asked for, the first that a file has."""

LOAD_SUFFIXES = tuple(READERS)
EXPECTED = (
    "loads [layers, experts] or [steps, layers, experts], or topk_ids [tokens, layers, k], "
    "in a .npy, .npz, .pt, .json or .csv file; or a folder of a framework's ranks"
)


def read_loads(
    path: Path, *, key: str | None = None, kind: Kind | None = None, num_experts: int | None = None
) -> Recording:
    """Read recorded loads.

    Args:
        path: .npy, .npz, .pt (read with weights_only=True), .json (nested lists, bare or named) or .csv (a line per
            layer). Loads are [L, E] or [T, L, E], any integer or float type, at least 0 and finite; a routing trace
            is topk_ids [tokens, L, k], integers in 0..E-1, or -1 for padding. An SGLang statistics dump
            (`logical_count` [B, L, E]) loses its all-zero steps. A dump of every pass (`records`, a .pt a rank, or
            the folder of them) and a folder of TensorRT-LLM's statistics are series, summed over the ranks.
        key: name of the array; by default the only one, or the first of `KNOWN_NAMES` that the file has.
        kind: what the array is; by default `topk_ids` if it, or the file it is alone in, bears that name, else loads.
        num_experts: E; by default as the loads have it, and for a trace the largest id + 1.

    Raises:
        FormatError: the file cannot be read, or holds something else; one line that says what was found where.
    """
    if os.path.isdir(path):  # False where the path cannot be looked at, which is told below
        return _joined(path, [read_dump(path, files, num_experts) for files in dumps_of(path)])
    named = read_named(path, LOAD_SUFFIXES, EXPECTED, lambda names: [pick_name(path, names, key)])
    if sglang_passes.RECORDS in named:
        del named  # read again with the map: dumps are large
        return sglang_passes.read_files(path, [path], num_experts)
    ((name, value),) = named.items()
    kind = kind or ("topk_ids" if TOPK_IDS in (name or path.stem) else "loads")
    try:
        array = as_array(value)
        if kind == "topk_ids":
            return _trace(path, array, num_experts)
        return _series(path, array, num_experts, from_sglang=name == LOGICAL_COUNT)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, EXPECTED, f"{f'{name}: ' if name else ''}{error}") from error


def dumps_of(path: Path) -> list[list[Path]]:
    """The dumps in a folder that the ranks of an engine wrote into, oldest first, each as its files; of TensorRT-LLM's
    statistics there is one, without a list of files.

    Raises:
        FormatError: the folder cannot be read, holds neither, or a rank's file of a dump is missing.
    """
    try:
        names = sorted(file.name for file in path.iterdir())
    except OSError as error:
        raise FormatError(path, EXPECTED, error.strerror or str(error)) from error
    if tensorrt_llm_statistics.META in names:
        return [[]]
    files = [path / name for name in names if name.lower().endswith(".pt")]
    if not files:
        found = f"a folder without {tensorrt_llm_statistics.META} and without .pt files"
        raise FormatError(path, EXPECTED, found)
    return sglang_passes.dumps_in(path, files)


def read_dump(path: Path, files: list[Path], num_experts: int | None) -> LoadSeries:
    """One of the dumps of a folder, see `dumps_of`."""
    if not files:
        return tensorrt_llm_statistics.read_folder(path, num_experts)
    if len(files) > 1:
        return sglang_passes.read_files(path, files, num_experts)
    recording = read_loads(files[0], num_experts=num_experts)
    if not isinstance(recording, LoadSeries):
        raise FormatError(files[0], sglang_passes.EXPECTED, "a routing trace")
    return recording


def _joined(path: Path, dumps: list[LoadSeries]) -> LoadSeries:
    """Series one after the other."""
    layers, experts = dumps[0].num_layers, max(dump.num_experts for dump in dumps)
    for dump in dumps:
        if (dump.num_layers, dump.num_experts) != (layers, experts):
            wanted = f"{layers} layers of {experts} experts, as in the other dumps"
            raise FormatError(dump.path, wanted, f"{dump.num_layers} of {dump.num_experts}")
    notes = [f"{len(dumps)} dumps, one after the other"] if len(dumps) > 1 else []
    notes += dict.fromkeys(note for dump in dumps for note in dump.notes)
    return LoadSeries(path, layers, experts, steps=np.concatenate([dump.steps for dump in dumps]), notes=tuple(notes))


def pick_name(path: Path, names: Sequence[str], key: str | None) -> str:
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing"
    if key is not None:
        if key in names and key != NAMELESS:
            return key
        raise FormatError(path, f"an array named {key!r}", "one array without a name" if NAMELESS in names else listed)
    if len(names) == 1:
        return names[0]
    if "phy2log" in names or "physical_to_logical_map" in names:
        raise FormatError(path, EXPECTED, "a plan, which holds no loads")
    for known in KNOWN_NAMES:
        if known in names:
            return known
    raise FormatError(path, f"{EXPECTED}; with several arrays, --key says which", listed)


def _series(path: Path, array: Array, num_experts: int | None, *, from_sglang: bool) -> LoadSeries:
    _refuse_shape(array, (2, 3))
    if array.shape[-1] != (num_experts or array.shape[-1]):
        raise ValueError(f"{array.shape[-1]} experts a layer, not {num_experts}")
    bad = ~(array >= 0) | ~np.isfinite(array)  # also true for NaN, which compares false
    if bad.any():
        at = np.unravel_index(np.argmax(bad), bad.shape)
        axes = ("step", "layer", "expert")[-array.ndim :]
        where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, at, strict=True))
        raise ValueError(f"a load of {array[at]} at [{where}]; loads are finite and at least 0")
    steps, note = array if array.ndim == 3 else array[None], ""
    if from_sglang:
        steps, note = drop_idle_steps(steps)
    notes = (note,) if note else ()
    return LoadSeries(path, steps.shape[1], steps.shape[2], steps=steps, notes=notes)


def _trace(path: Path, array: Array, num_experts: int | None) -> RoutingTrace:
    if array.dtype.kind not in "iu":
        raise ValueError(f"topk_ids of type {array.dtype}; ids are integers")
    _refuse_shape(array, (3,))
    largest, smallest = int(array.max()), int(array.min())
    if largest < 0 <= smallest + 1:
        raise ValueError("topk_ids that are all -1, which marks padding")
    experts = num_experts or largest + 1
    if smallest < -1 or largest >= experts:
        bad = (array < -1) | (array >= experts)
        token, layer, choice = np.unravel_index(np.argmax(bad), bad.shape)
        raise ValueError(
            f"id {array[token, layer, choice]} at [token {token}, layer {layer}]; "
            f"ids are 0 to {experts - 1}, or -1 for padding"
        )
    notes = []
    if num_experts is None:
        notes.append(f"{experts} experts: the largest id is {largest} (--experts to say otherwise)")
    if smallest == -1:
        notes.append(f"{int((array == -1).sum())} ids of {array.size} are -1, taken for padding and not counted")
    return RoutingTrace(path, array.shape[1], experts, topk_ids=array, notes=tuple(notes))


def _refuse_shape(array: Array, dimensions: tuple[int, ...]) -> None:
    shape = list(array.shape)
    if array.ndim not in dimensions:
        raise ValueError(f"an array of shape {shape}, {array.ndim}-dimensional")
    if 0 in shape:
        raise ValueError(f"an empty array of shape {shape}")
