"""The named arrays of a .npy, .npz, .pt, .json or .csv file, whoever wrote it."""

from __future__ import annotations

import csv
import json
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eplb_triton.checks import check_dense
from eplb_triton.formats.errors import FormatError
from eplb_triton.loads import LOAD_DTYPES
from eplb_triton.printing import one_line

Array = npt.NDArray[Any]
Pick = Callable[[Sequence[str]], Sequence[str]]

NAMELESS = ""
"""The name of the content of a file that has no names: .npy, .csv, a bare tensor or list."""


def read_named(
    path: Path,
    suffixes: Sequence[str],
    expected: str,
    pick: Pick,
    readers: Mapping[str, Callable[[Path, Pick], dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The values of a file that `pick` chooses from their names; nothing else of a .npz is read.

    Args:
        path: the file; its suffix says how it is read.
        suffixes: the suffixes taken, a subset of those of `readers`.
        expected: what the file should hold, for the messages.
        pick: names in the file -> names wanted; may raise FormatError. A nameless file has the name `NAMELESS`.
        readers: of each suffix; None: `READERS`.

    Returns:
        name -> array, tensor, nested list or scalar, as the file has it; `as_array` checks it.

    Raises:
        FormatError: no such file, not a plain file, empty, of another suffix, or unreadable.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(path, expected, "no such file") from None
    except OSError as error:  # no permission on the folder, a name too long, links in a circle
        raise FormatError(path, expected, error.strerror or one_line(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(path, expected, "a folder" if path.is_dir() else "something that is no plain file")
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise FormatError(path, expected, f"a name that ends in {path.suffix or 'no suffix'!r}")
    if status.st_size == 0:
        raise FormatError(path, expected, "an empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # readers warn about files that they then refuse
            return (READERS if readers is None else readers)[suffix](path, pick)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(path, expected, error.strerror or one_line(error)) from error
    # Broken bytes make the decoders raise almost anything (zlib.error, KeyError, struct.error, MemoryError, ...).
    except Exception as error:
        raise FormatError(path, expected, f"content that does not read as {suffix}: {_why(suffix, error)}") from error


def _why(suffix: str, error: Exception) -> str:
    # torch.load's own text recommends weights_only=False: running whatever code the file holds.
    return f"torch.load(weights_only=True) refuses it ({type(error).__name__})" if suffix == ".pt" else one_line(error)


def choose(content: Any, pick: Pick) -> dict[str, Any]:
    """What `pick` chooses of a file's content, which has the name `NAMELESS` if it has none."""
    named = {str(name): value for name, value in content.items()} if isinstance(content, dict) else {NAMELESS: content}
    return {name: named[name] for name in pick(list(named))}


def _read_npy(path: Path, pick: Pick) -> dict[str, Any]:
    with open(path, "rb") as file:
        return choose(np.lib.format.read_array(file, allow_pickle=False), pick)


def _read_npz(path: Path, pick: Pick) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle, and recommend to load it unsafely
        raise ValueError("no zip archive")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in pick(archive.files)}


def _read_pt(path: Path, pick: Pick) -> dict[str, Any]:
    return choose(torch.load(path, map_location="cpu", weights_only=True), pick)


def _read_json(path: Path, pick: Pick) -> dict[str, Any]:
    return choose(json.loads(path.read_text(encoding="utf-8-sig")), pick)


def _read_csv(path: Path, pick: Pick) -> dict[str, Any]:
    """Rows of numbers; lines that are blank or begin with # are left out, and so is a first line without a number."""
    rows: list[list[float]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header_possible = True
        for cells in reader:
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            if header_possible and not any(map(_is_number, cells)):
                header_possible = False
                continue
            header_possible = False
            for column, cell in enumerate(cells, 1):
                if not _is_number(cell):
                    raise ValueError(f"{cell[:40]!r} on line {reader.line_num}, column {column}, is no number")
            if rows and len(cells) != len(rows[0]):
                raise ValueError(f"line {reader.line_num} has {len(cells)} numbers, the first has {len(rows[0])}")
            rows.append([float(cell) for cell in cells])
    if not rows:
        raise ValueError("no line of numbers")
    return choose(np.array(rows), pick)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # float() takes 1_000, no other program does


READERS: dict[str, Callable[[Path, Pick], dict[str, Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".json": _read_json,
    ".csv": _read_csv,
}


def as_array(value: Any) -> Array:
    """`value` (array, tensor, number or nested list) as a regular array of real numbers.

    bfloat16 and the 8-bit floats come back as float32, everything else in its own type.

    Raises:
        ValueError: ragged, or not real numbers; the text says what was found, and where.
    """
    array = _regular(value, (), set())
    if array.dtype.kind not in "iuf":
        raise ValueError(f"values of type {array.dtype}")
    return array


def _regular(value: Any, at: tuple[int, ...], seen: set[int]) -> Array:
    """`seen` are the parts read so far: a few that stand in many places would fill any memory."""
    if at and isinstance(value, (np.ndarray, torch.Tensor, list, tuple)):
        if id(value) in seen:
            raise ValueError(f"the same list at {list(at)} and in an earlier place; a tensor or an array takes less")
        seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, torch.Tensor):
        return _from_tensor(value)
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) <= {int, float}:  # most lists; a loop over the entries takes 10 times as long
            return np.array(value)
        if any(isinstance(entry, (list, tuple, np.ndarray, torch.Tensor)) for entry in value):
            return _stacked([_regular(entry, (*at, index), seen) for index, entry in enumerate(value)], at)
        index, entry = next((i, entry) for i, entry in enumerate(value) if type(entry) not in (int, float))
        raise ValueError(f"{repr(entry)[:40]} at {[*at, index]}, which is no number")
    if not at and type(value) in (int, float):
        return np.array(value)
    where = f" at {list(at)}" if at else ""
    raise ValueError(f"a {type(value).__name__} ({repr(value)[:40]}){where}, which is no list of numbers")


def _stacked(rows: list[Array], at: tuple[int, ...]) -> Array:
    for index, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise ValueError(
                f"ragged rows: {[*at, index]} is of shape {list(row.shape)}, {[*at, 0]} of shape {list(rows[0].shape)}"
            )
    return np.stack(rows)


def _from_tensor(tensor: torch.Tensor) -> Array:
    try:
        check_dense("a tensor", tensor, "")
    except ValueError as error:
        raise ValueError(str(error).partition(", must")[0]) from None
    dense = tensor.detach()
    if dense.numel() * dense.element_size() > dense.untyped_storage().nbytes():
        raise ValueError(f"a view of shape {list(dense.shape)} of fewer numbers; tensor.contiguous() before saving it")
    if dense.dtype not in LOAD_DTYPES:
        raise ValueError(f"values of type {str(dense.dtype).removeprefix('torch.')}")
    dense = dense.resolve_neg()
    if dense.dtype.is_floating_point and dense.dtype not in (torch.float16, torch.float32, torch.float64):
        dense = dense.to(torch.float32)
    return dense.numpy()
