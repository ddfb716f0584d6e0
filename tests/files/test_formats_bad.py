"""Files that hold no loads, damaged ones and hostile ones: each is refused in one line."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_triton.formats import (
    FormatError,
    check_writable,
    read_loads,
    write_whole,
)
from eplb_triton.printing import printable
from tests.recordings import IDS, LOADS, SERIES, found, save


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def array(value: Any) -> Callable[[Path], object]:
    return lambda path: save(path, value)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


BAD_FILES = [
    ("missing.npy", lambda path: None, "no such file"),
    ("folder.npy", Path.mkdir, "a folder"),
    ("pipe.npy", os.mkfifo, "no plain file"),
    ("x.txt", text("1"), "a name that ends in '.txt'"),
    ("x", text("1"), "a name that ends in 'no suffix'"),
    ("x.npy", nothing, "an empty file (0 bytes)"),
    ("x.npz", nothing, "an empty file (0 bytes)"),
    ("x.pt", nothing, "an empty file (0 bytes)"),
    ("x.json", nothing, "an empty file (0 bytes)"),
    ("x.csv", nothing, "an empty file (0 bytes)"),
    ("x.npy", text("garbage"), "does not read as .npy"),
    ("x.npz", text("garbage"), "no zip archive"),
    ("x.pt", text("garbage"), "torch.load(weights_only=True) refuses it"),
    ("x.json", text('{"loads": [1'), "does not read as .json"),
    ("x.json", text("[" * 100_000), "does not read as .json"),
    ("x.json", lambda path: path.write_bytes(b"\xff\xfe"), "does not read as .json"),
    ("x.csv", text("1,2\n3,x\n"), "'x' on line 2, column 2, is no number"),
    ("x.csv", text("1,2\n3,4,5\n"), "line 2 has 3 numbers, the first has 2"),
    ("x.csv", text("1,1_0\n"), "'1_0' on line 1, column 2"),
    ("x.csv", text("a,b\n"), "no line of numbers"),
    ("x.csv", text("1,2,\n"), "'' on line 1, column 3"),
    ("x.npy", array(np.arange(4)), "shape [4], 1-dimensional"),
    ("x.npy", array(np.zeros((1, 1, 1, 1))), "4-dimensional"),
    ("x.npy", array(np.zeros((0, 4))), "an empty array of shape [0, 4]"),
    ("x.npy", array(np.zeros((2, 0, 4))), "an empty array of shape [2, 0, 4]"),
    ("x.npy", array(np.array([["a", "b"]])), "values of type <U1"),
    ("x.npy", array(np.array([[1j, 2]])), "values of type complex128"),
    ("x.npy", array(np.array([[True, False]])), "values of type bool"),
    ("x.npy", lambda path: np.save(path, np.array([{}, []], dtype=object)), "Object arrays cannot be loaded"),
    ("x.npy", array(np.array([[1.0, np.nan]])), "a load of nan at [layer 0, expert 1]"),
    ("x.npy", array(np.array([[[1.0]], [[-2.0]]])), "a load of -2.0 at [step 1, layer 0, expert 0]"),
    ("x.npy", array(np.array([[np.inf, 1]])), "a load of inf at [layer 0, expert 0]"),
    ("x.json", text("[[1, 2], [3]]"), "ragged rows: [1] is of shape [1], [0] of shape [2]"),
    ("x.json", text("[[[1], [2]], [[3], [4, 5]]]"), "ragged rows: [1, 1] is of shape [2], [1, 0] of shape [1]"),
    ("x.json", text('[[1, "2"]]'), "'2' at [0, 1], which is no number"),
    ("x.json", text("[[1, true]]"), "True at [0, 1], which is no number"),
    ("x.json", text("[[1, null]]"), "None at [0, 1], which is no number"),
    ("x.json", text("[[1], 2]"), "a int (2) at [1], which is no list of numbers"),
    ("x.json", text("[[NaN, 1]]"), "a load of nan"),
    ("x.json", text("[[1, 99999999999999999999999]]"), "values of type object"),
    ("x.json", text('"loads"'), "a str ('loads'), which is no list of numbers"),
    ("x.json", text("{}"), "nothing"),
    ("x.json", text("[]"), "shape [0], 1-dimensional"),
    ("x.json", text('{"loads": {"0": [1]}}'), "a dict"),
    ("x.pt", lambda path: torch.save(Path("x"), path), "torch.load(weights_only=True) refuses it"),
    ("x.pt", lambda path: torch.save("x", path), "a str ('x')"),
    ("x.npz", array({"phy2log": LOADS, "logcnt": LOADS}), "a plan, which holds no loads"),
    ("x.npz", array({"topk_ids": IDS.astype(np.float32)}), "topk_ids of type float32; ids are integers"),
    ("x.npz", array({"topk_ids": IDS[0]}), "shape [3, 2], 2-dimensional"),
    ("x.npz", array({"topk_ids": np.where(IDS == 7, -2, IDS)}), "id -2 at [token 0, layer 0]"),
    ("x.npz", array({"topk_ids": np.full((2, 3, 1), -1)}), "topk_ids that are all -1"),
    ("x.pt", array({"logical_count": np.zeros((4, 2, 2))}), "4 steps that are all zero"),
]


@pytest.mark.parametrize(("name", "make", "text"), BAD_FILES, ids=[f"{name}-{text}" for name, _, text in BAD_FILES])
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str, make: Any, text: str) -> None:
    make(tmp_path / name)
    assert text in found(tmp_path / name)


def test_an_id_beyond_the_experts_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", {"topk_ids": IDS})
    assert "topk_ids: id 7 at [token 0, layer 0]; ids are 0 to 6, or -1" in found(path, num_experts=7)


def test_experts_that_the_loads_do_not_have(tmp_path: Path) -> None:
    assert found(save(tmp_path / "x.npy", LOADS), num_experts=7) == "8 experts a layer, not 7"


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read_loads(tmp_path / "a\nb.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"x{suffix}", SERIES).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for end in [*range(1, len(whole), max(1, len(whole) // 50)), len(whole) - 1]:
        cut.write_bytes(whole[:end])
        with pytest.raises(FormatError):
            read_loads(cut)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".json", ".csv"])
def test_broken_bytes_raise_nothing_but_format_errors(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"x{suffix}", LOADS).read_bytes()
    rng = random.Random(1)
    broken = tmp_path / f"broken{suffix}"
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        broken.write_bytes(content)
        try:
            read_loads(broken)
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most broken files still hold loads


def repeated_lists(path: Path) -> None:
    """10^9 numbers in a file of a few hundred bytes: every list holds the one before ten times."""
    value: list[Any] = [1.0] * 10
    for _ in range(8):
        value = [value] * 10
    torch.save(value, path)


def sparse(path: Path) -> None:
    torch.save(torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (10**5, 10**5)), path)


def quantized(path: Path) -> None:
    torch.save(torch.quantize_per_tensor(torch.ones(2, 4), 1.0, 0, torch.quint8), path)


def jagged(path: Path) -> None:
    torch.save(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), path)


TENSORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "meta": (lambda path: torch.save(torch.ones(2, 4, device="meta"), path), "a tensor is on the meta device"),
    "quantized": (quantized, "a tensor has the quantized dtype torch.quint8"),
    "nested": (jagged, ""),  # the text depends on PyTorch: some refuse to load it
    "sparse": (sparse, ""),
    "expanded": (
        lambda path: torch.save(torch.ones(1).expand(60_000, 60_000), path),
        "a view of shape [60000, 60000] of fewer numbers; tensor.contiguous() before saving it",
    ),
    "repeated lists": (repeated_lists, " and in an earlier place"),
    "a repeated tensor": (lambda path: torch.save([torch.ones(2)] * 3, path), "the same list at [1] and in an earlier"),
    "conjugated": (lambda path: torch.save(torch.ones(2, 4, dtype=torch.complex64).conj(), path), "of type complex64"),
    "boolean": (lambda path: torch.save(torch.ones(2, 4, dtype=torch.bool), path), "values of type bool"),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_are_not_loads_are_refused_before_they_fill_memory(tmp_path: Path, name: str) -> None:
    make, text = TENSORS[name]
    make(tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 20_000
    assert text in found(tmp_path / "x.pt")


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # root may look everywhere

    monkeypatch.setattr(Path, "stat", closed)
    assert found(tmp_path / "x.npy") == "Permission denied"
    with pytest.raises(FormatError, match="Permission denied"):
        check_writable(tmp_path / "x.npy")


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    circle = tmp_path / "x.npy"
    circle.symlink_to(circle)
    assert found(circle) == "Too many levels of symbolic links"
    long = tmp_path / ("x" * 300 + ".npy")
    assert found(long) == "File name too long"
    for path in (circle, long):
        with pytest.raises(FormatError, match=r"expected a file that can be written; found (Too many|File name)"):
            check_writable(path)
        with pytest.raises(FormatError, match=r"expected a file that can be written; found (Too many|File name)"):
            write_whole(path, b"")
    assert circle.is_symlink()
    assert found(save(tmp_path / "y.npy", LOADS) / "x.npy") == "no such file"


def test_escape_sequences_of_a_file_stay_in_it(tmp_path: Path) -> None:
    named: dict[str, Any] = {"a\x1b[31m": LOADS, "b": LOADS}
    np.savez(tmp_path / "x.npz", **named)
    assert found(tmp_path / "x.npz") == r"a\x1b[31m, b"
    assert printable("1\n\x1b]0;title\x07 \u202e") == r"1 \x1b]0;title\x07 \u202e"
