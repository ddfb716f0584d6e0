"""Recordings, a step at a time: of a .npy or .npz no more is in memory than a few steps, however long it is."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from eplb_triton.formats import loads as reading
from eplb_triton.formats.arrays import NAMELESS, Array
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.recordings import STEP_TOKENS, LoadSeries, Recording, RoutingTrace
from eplb_triton.formats.sglang import LOGICAL_COUNT

_VALUES_AT_ONCE = 1 << 20  # 8 MiB as int64

Rows = Callable[[Iterable[int]], Iterator[Array]]
"""Of numbers of rows: so many of an array, one lot after the other, from its first."""


@dataclass(frozen=True, eq=False)
class StepStream:
    """Loads of one step after the other, as often as they are asked for.

    Args:
        paths: what they are read from.
        num_layers: L.
        num_experts: E.
        length: steps.
        chunks: gives [n, L, E] of consecutive steps, n >= 1: `length` in all.
        notes: what a user should know about how the files were read, one sentence each.
    """

    paths: tuple[Path, ...]
    num_layers: int
    num_experts: int
    length: int
    chunks: Callable[[], Iterator[Array]]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """[L, E] int64 or float64 of each step.

        Raises:
            FormatError: a load that is none, when it is reached.
        """
        for chunk in self.chunks():
            yield from torch.from_numpy(chunk.astype(np.int64 if chunk.dtype.kind in "iu" else np.float64))


def open_steps(
    paths: Sequence[Path],
    *,
    key: str | None = None,
    kind: reading.Kind | None = None,
    num_experts: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> StepStream:
    """The steps of recordings, those of one after those of the other.

    A series in a .npy or .npz is read as it is asked for; so is a trace, after a look at all of its ids. Whatever else
    `read_loads` takes is read whole, and where there are several recordings, or dumps in a folder, one is in memory at
    a time.

    Args:
        paths: files or folders, oldest first, see `read_loads`; at least one.
        key, kind, num_experts: as of `read_loads`.
        step_tokens: consecutive tokens of a trace that are a step; tokens left over are spread over its steps.

    Raises:
        FormatError: as `read_loads`; or the recordings differ in layers or experts.
    """
    sources: list[tuple[Path, list[Path] | None]] = []  # files: of a dump, which a folder may have many of
    for path in paths:
        sources += [(path, files) for files in (reading.dumps_of(path) if path.is_dir() else [None])]
    parts = [_part(*source, key, kind, num_experts, keep=len(sources) == 1) for source in sources]
    experts = max(part.num_experts for part in parts)
    for (path, _), part in zip(sources, parts, strict=True):
        differs = part.num_experts != experts and not part.is_trace
        if part.num_layers != parts[0].num_layers or differs:
            wanted = f"{parts[0].num_layers} layers of {experts} experts, as in the other recordings"
            raise FormatError(path, wanted, f"{part.num_layers} of {part.num_experts}")
    notes = [note for part in parts for note in part.notes]
    if num_experts is None and any(part.is_trace for part in parts):
        notes.insert(0, f"{experts} experts: the largest id is {experts - 1} (--experts to say otherwise)")

    def chunks() -> Iterator[Array]:
        for (path, _), part in zip(sources, parts, strict=True):
            yield from _counted(path, part, experts, step_tokens) if part.is_trace else _checked(path, part)

    length = sum(_steps_of(part, step_tokens) for part in parts)
    return StepStream(tuple(paths), parts[0].num_layers, experts, length, chunks, tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class _Part:
    """One recording: `length` rows, of loads [L, E] or, in a trace, of ids [L, k]."""

    num_layers: int
    num_experts: int
    length: int
    row_values: int
    rows: Rows
    is_trace: bool
    notes: tuple[str, ...] = ()


def _part(
    path: Path,
    files: list[Path] | None,
    key: str | None,
    kind: reading.Kind | None,
    num_experts: int | None,
    *,
    keep: bool,
) -> _Part:
    array = _ArrayFile.of(path, key)
    if array is not None and array.name != LOGICAL_COUNT:
        is_trace = (kind or ("topk_ids" if reading.TOPK_IDS in (array.name or path.stem) else "loads")) == "topk_ids"
        found = _trace_in(array, num_experts) if is_trace else _series_in(array, num_experts)
        if found is not None:
            return found

    def read() -> tuple[Recording, Array]:  # refuses what nobody can use
        if files is None:
            recording = reading.read_loads(path, key=key, kind=kind, num_experts=num_experts)
        else:
            recording = reading.read_dump(path, files, num_experts)
        assert isinstance(recording, (LoadSeries, RoutingTrace))
        return recording, recording.topk_ids if isinstance(recording, RoutingTrace) else recording.steps

    recording, held = read()
    is_trace = isinstance(recording, RoutingTrace)
    notes = tuple(note for note in recording.notes if not (is_trace and "the largest id is" in note))
    sizes = recording.num_layers, recording.num_experts, len(held), held[0].size
    kept = held if keep else None
    return _Part(*sizes, lambda counts: _of_memory(read()[1] if kept is None else kept, counts), is_trace, notes)


def _series_in(array: _ArrayFile, num_experts: int | None) -> _Part | None:
    """The series, or None where it is none that can be streamed."""
    if len(array.shape) != 3 or array.dtype.kind not in "iuf" or array.shape[2] != (num_experts or array.shape[2]):
        return None
    return _Part(*array.shape[1:], array.shape[0], array.row_values, array.rows, is_trace=False)


def _trace_in(array: _ArrayFile, num_experts: int | None) -> _Part | None:
    """The trace, or None where it is none, or one with an id that is no expert's."""
    if len(array.shape) != 3 or array.dtype.kind not in "iu":
        return None
    largest, smallest, padding = -1, 0, 0
    for ids in array.rows(_lots(array.shape[0], array.row_values)):
        largest, smallest = max(largest, int(ids.max())), min(smallest, int(ids.min()))
        padding += int((ids == -1).sum()) if smallest < 0 else 0
    experts = num_experts or largest + 1
    if not (smallest >= -1 and 0 <= largest < experts):
        return None
    total = int(np.prod(array.shape))
    notes = (f"{padding} ids of {total} are -1, taken for padding and not counted",) if padding else ()
    return _Part(array.shape[1], experts, array.shape[0], array.row_values, array.rows, True, notes)


@dataclass(frozen=True)
class _ArrayFile:
    """An array in a .npy, or in a member of a .npz: what its header says, and its rows as they are asked for."""

    path: Path
    member: str | None
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @classmethod
    def of(cls, path: Path, key: str | None) -> _ArrayFile | None:
        """The array that `read_loads` would take; None where the file is none of these or its header is odd."""
        try:
            if path.suffix.lower() == ".npy" and key is None:
                return cls._opened(path, None, NAMELESS, path.stat().st_size)
            if path.suffix.lower() == ".npz" and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    sizes = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                name = reading.pick_name(path, list(sizes), key)
                return cls._opened(path, sizes[name].filename, name, sizes[name].file_size)
        except FormatError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # told by `read_loads`, in its own words
            return None
        return None

    @classmethod
    def _opened(cls, path: Path, member: str | None, name: str, size: int) -> _ArrayFile | None:
        with _opened(path, member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            offset = file.tell()
        whole = dtype.hasobject or by_columns or size != offset + dtype.itemsize * int(np.prod(shape, dtype=object))
        return None if whole or 0 in shape or len(shape) < 2 else cls(path, member, name, shape, dtype, offset)

    @property
    def row_values(self) -> int:
        """Numbers of a step or token."""
        return int(np.prod(self.shape[1:]))

    def rows(self, counts: Iterable[int]) -> Iterator[Array]:
        """See `Rows`."""
        with _opened(self.path, self.member) as file:
            file.read(self.offset)
            for count in counts:
                content = file.read(count * self.row_values * self.dtype.itemsize)
                yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def _opened(path: Path, member: str | None) -> IO[bytes]:
    return open(path, "rb") if member is None else zipfile.ZipFile(path).open(member)


def _of_memory(held: Array, counts: Iterable[int]) -> Iterator[Array]:
    first = 0
    for count in counts:
        yield held[first : first + count]
        first += count


def _lots(length: int, row_values: int) -> Iterator[int]:
    """Numbers of rows that add up to `length`."""
    most = max(1, _VALUES_AT_ONCE // row_values)
    for first in range(0, length, most):
        yield min(most, length - first)


def _steps_of(part: _Part, step_tokens: int) -> int:
    return max(1, part.length // step_tokens) if part.is_trace else part.length


def _checked(path: Path, part: _Part) -> Iterator[Array]:
    """The steps of a series, each load looked at."""
    first = 0
    for steps in part.rows(_lots(part.length, part.row_values)):
        if not (steps.min() >= 0 and np.isfinite(steps.max())):  # false for NaN
            step, layer, expert = np.argwhere(~(steps >= 0) | ~np.isfinite(steps))[0].tolist()
            found = f"a load of {steps[step, layer, expert]} at [step {first + step}, layer {layer}, expert {expert}]"
            raise FormatError(path, reading.EXPECTED, f"{found}; loads are finite and at least 0")
        first += len(steps)
        yield steps


def _counted(path: Path, part: _Part, experts: int, step_tokens: int) -> Iterator[Array]:
    """The steps of a trace: how often each expert is chosen."""
    count = _steps_of(part, step_tokens)
    edges = (index * part.length // count for index in range(count + 1))
    for ids in part.rows(last - first for first, last in pairwise(edges)):
        loads = RoutingTrace(path, part.num_layers, experts, topk_ids=ids).loads(0, len(ids))
        yield loads.to(torch.int64).unsqueeze(0).numpy()
