"""SGLang: dumps of its expert distribution recorder in the modes `per_pass` and `per_token`, a file a rank.

A dump is `torch.save` of a dict: `records`, each with `forward_pass_id`, `rank` and `global_physical_count` [L, P],
what a rank saw; and `last_physical_to_logical_map` [L, P], by which slots are experts. Loads of a pass are the sum over
the ranks.
A folder of several dumps has a file a rank for each, with the time and the rank in its name.
Source: sglang/srt/eplb/expert_distribution.py, `_DetailAccumulator.dump`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eplb_triton.formats.arrays import Array, as_array, read_named
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.recordings import LoadSeries
from eplb_triton.formats.slot_map import checked_map, integer

RECORDS = "records"
MAP = "last_physical_to_logical_map"
COUNTS = "global_physical_count"
_NAME = re.compile(r"expert_distribution_recorder_(\d+(?:\.\d+)?)(?:_(\d+))?\.pt")
EXPECTED = f"SGLang's recorder dump, {RECORDS} and {MAP}"


def is_dump(names: list[str]) -> bool:
    """Whether a file with these names is such a dump."""
    return RECORDS in names


def dumps_in(folder: Path, files: list[Path]) -> list[list[Path]]:
    """The files of a recorder's folder, dump by dump, oldest first: by the time and the rank in the names that SGLang
    gives them. Files of any other name are one dump.

    Raises:
        FormatError: some rank has more files than another.
    """
    of_ranks: dict[str | None, list[tuple[float, Path]]] = {}
    for file in files:
        named = _NAME.fullmatch(file.name)
        if named is None:
            return [files]
        of_ranks.setdefault(named[2], []).append((float(named[1]), file))
    numbers = {rank: len(its) for rank, its in of_ranks.items()}
    if len(set(numbers.values())) > 1:
        found = ", ".join(f"{number} without a rank" if rank is None else f"{number} of rank {rank}"
                          for rank, number in sorted(numbers.items(), key=lambda item: item[0] or ""))  # fmt: skip
        raise FormatError(folder, f"{EXPECTED}, a file of every rank for every dump", found)
    return [[file for _, file in dump] for dump in zip(*map(sorted, of_ranks.values()), strict=True)]


def read_files(path: Path, files: list[Path], num_experts: int | None) -> LoadSeries:
    """The loads of every pass that all files have, summed over them.

    Args:
        path: the file or the folder of files, for the messages.
        files: .pt, one a rank.
        num_experts: E; None: the largest expert of the map + 1.

    Raises:
        FormatError: a file is no dump, or lacks a pass's counts; two files are of one rank, have other maps, or no pass
            in common.
    """
    slots, experts = None, 0
    passes: dict[int, Array] = {}
    seen: dict[int, int] = {}
    ranks: set[int] = set()
    for file in files:
        content = _read(file)
        mine, experts = checked_map(file, EXPECTED, MAP, content[MAP], num_experts)
        if slots is not None and not torch.equal(slots, mine):
            raise FormatError(file, EXPECTED, f"another {MAP} than in {files[0].name}, must be one map on all ranks")
        slots = mine
        in_file = _passes_of(file, content[RECORDS], tuple(mine.shape), ranks)
        for number, counts in in_file.items():
            passes[number] = passes[number] + counts if number in passes else counts
            seen[number] = seen.get(number, 0) + 1
    whole = [number for number in sorted(passes) if seen[number] == len(files)]
    if slots is None or not whole:
        raise FormatError(path, EXPECTED, "no pass that every file has a record of")
    layers = slots.shape[0]
    steps = np.zeros((len(whole), layers, experts), dtype=np.int64)
    of_layer = np.arange(layers)[:, None]
    for step, number in zip(steps, whole, strict=True):
        np.add.at(step, (of_layer, slots.numpy()), passes[number])
    notes = [f"{len(whole)} passes of {len(files)} {'rank' if len(files) == 1 else 'ranks'}, summed over ranks"]
    if len(whole) < len(passes):
        notes.append(f"{len(passes) - len(whole)} passes that some rank has no record of were left out")
    return LoadSeries(path, layers, experts, steps=steps, notes=tuple(notes))


def _read(file: Path) -> dict[str, Any]:
    def pick(names: Any) -> list[str]:
        missing = [name for name in (RECORDS, MAP) if name not in names]
        if missing:
            raise FormatError(file, EXPECTED, f"no {', '.join(missing)} in it")
        return [RECORDS, MAP]

    content = read_named(file, (".pt",), EXPECTED, pick)
    if not isinstance(content[RECORDS], list) or not content[RECORDS]:
        raise FormatError(file, EXPECTED, f"{RECORDS} that are no list, or an empty one")
    return content


def _passes_of(file: Path, records: list[Any], shape: tuple[int, ...], ranks: set[int]) -> dict[int, Array]:
    """[L, P] int64 of every pass of one rank, its gatherers summed; adds the rank to `ranks`."""
    passes: dict[int, Array] = {}
    rank = None
    used: dict[int, int] = {}  # bytes taken of a storage: records that share one would fill any memory
    for index, record in enumerate(records):
        where = f"{RECORDS}[{index}]"
        for name in ("forward_pass_id", "rank", COUNTS):
            if not isinstance(record, dict) or name not in record:
                raise FormatError(file, EXPECTED, f"no {name} in {where}")
        number = integer(file, EXPECTED, f"{where}.forward_pass_id", record["forward_pass_id"])
        rank = integer(file, EXPECTED, f"{where}.rank", record["rank"], rule=rank)
        counts = record[COUNTS]
        try:
            array = as_array(counts)
            if array.dtype.kind not in "iu" or array.shape != shape:
                raise ValueError(f"type {array.dtype} and shape {list(array.shape)}, must be integers {list(shape)}")
            if int(array.min()) < 0:
                raise ValueError(f"a count of {int(array.min())}, must be at least 0")
            if isinstance(counts, torch.Tensor):
                storage = counts.untyped_storage()
                used[storage.data_ptr()] = used.get(storage.data_ptr(), 0) + counts.numel() * counts.element_size()
                if used[storage.data_ptr()] > storage.nbytes():
                    raise ValueError("the same numbers as in an earlier record")
        except (ValueError, RecursionError) as error:
            raise FormatError(file, EXPECTED, f"{where}.{COUNTS}: {error}") from error
        passes[number] = passes[number] + array if number in passes else array.astype(np.int64)
    if rank in ranks:
        raise FormatError(file, EXPECTED, f"rank {rank}, which another file is of, must be a file a rank")
    ranks.add(rank or 0)
    return passes
