"""TensorRT-LLM: a folder of expert statistics, `meta_info.json` and a `rank{r}.safetensors` for every rank.

A tensor is called `{iteration}_{layer}`, int64 [E], what the rank saw; loads of an iteration are the sum over ranks.
safetensors (the extra `formats`) reads, which maps files and never runs what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from eplb_triton.formats.arrays import Array, as_array, read_named
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.recordings import LoadSeries
from eplb_triton.formats.slot_map import integer
from eplb_triton.printing import one_line

META = "meta_info.json"
EXPECTED = f"a folder of TensorRT-LLM's expert statistics: {META} and rank0.safetensors, rank1.safetensors, ..."
INSTALL = "pip install 'eplb-triton[formats]'"
_RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_KEY = re.compile(r"(\d{1,12})_(\d{1,6})")


def read_folder(path: Path, num_experts: int | None) -> LoadSeries:
    """The loads of every iteration, oldest first, layers by their number, summed over ranks.

    Raises:
        FormatError: safetensors is missing; a rank, a layer of an iteration or `num_experts` is missing or differs.
    """
    meta = read_named(path / META, (".json",), EXPECTED, lambda names: names)
    if "num_experts" not in meta:
        raise FormatError(path / META, EXPECTED, "no num_experts in it")
    experts = integer(path / META, EXPECTED, "num_experts", meta["num_experts"], rule=num_experts, lowest=1)
    by_rank = {int(match[1]): file for file in path.iterdir() if (match := _RANK.fullmatch(file.name))}
    for rank in range(len(by_rank) or 1):
        if rank not in by_rank:
            raise FormatError(path, EXPECTED, f"no rank{rank}.safetensors")
    loads: dict[tuple[int, int], Array] = {}
    for rank in range(len(by_rank)):
        file = by_rank[rank]
        mine = _read(file, experts)
        if rank and set(mine) != set(loads):
            iteration, layer = min(set(mine) ^ set(loads))
            has, lacks = (file.name, by_rank[0].name) if (iteration, layer) in mine else (by_rank[0].name, file.name)
            raise FormatError(
                file, EXPECTED, f"{iteration}_{layer} in {has} and not in {lacks}, must be in every rank's"
            )
        for key, counts in mine.items():
            loads[key] = loads[key] + counts if rank else counts
    iterations = sorted({iteration for iteration, _ in loads})
    layers = sorted({layer for _, layer in loads})
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in loads:
                raise FormatError(path, EXPECTED, f"no {iteration}_{layer}, must be there as for other iterations")
    steps = np.stack([np.stack([loads[iteration, layer] for layer in layers]) for iteration in iterations])
    note = f"layers {layers[0]} to {layers[-1]} of the model, summed over {len(by_rank)} ranks"
    return LoadSeries(path, len(layers), experts, steps=steps, notes=(note,))


def _read(file: Path, experts: int) -> dict[tuple[int, int], Array]:
    """The counts of one rank, by iteration and layer."""
    try:
        from safetensors import safe_open  # noqa: PLC0415 - the extra may be missing
    except ModuleNotFoundError:
        raise FormatError(file, EXPECTED, f"no safetensors to read it: {INSTALL}") from None
    counts: dict[tuple[int, int], Array] = {}
    try:
        with safe_open(file, framework="np") as opened:
            tensors: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # broken bytes raise errors of its own
        raise FormatError(file, EXPECTED, f"content that does not read as .safetensors: {one_line(error)}") from error
    for name, value in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise FormatError(file, EXPECTED, f"a tensor {name!r}, must be called ITERATION_LAYER")
        array = as_array(value)
        if array.dtype.kind not in "iu" or array.shape != (experts,):
            found = f"{name} of type {array.dtype} and shape {list(array.shape)}"
            raise FormatError(file, EXPECTED, f"{found}, must be integers [{experts}]")
        if int(array.min()) < 0:
            raise FormatError(file, EXPECTED, f"{name} with a count of {int(array.min())}, must be at least 0")
        counts[int(match[1]), int(match[2])] = array.astype(np.int64)
    if not counts:
        raise FormatError(file, EXPECTED, "no tensors")
    return counts
