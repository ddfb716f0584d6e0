"""Write beside, then rename: a file is there whole, or as it was before."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from eplb_triton.formats.errors import FormatError

EXPECTED = "a file that can be written"


def check_writable(path: Path) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises:
        FormatError: `path` is a folder or cannot be looked at, or its folder is missing, no folder, or not writable.
    """
    folder = _target(path).parent
    if path.is_dir():
        raise FormatError(path, EXPECTED, "a folder")
    if not folder.is_dir():
        raise FormatError(path, EXPECTED, "no folder to put it in")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FormatError(path, EXPECTED, "a folder without write permission")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that takes the place of `path` once all of it is on the disk.

    It keeps the permissions of the file it takes the place of. Any exception, KeyboardInterrupt included, leaves `path`
    as it was and nothing beside it. The content comes in
    one piece since the writers of NumPy and PyTorch raise other errors, or other text, when a disk is full.

    Raises:
        FormatError: the file cannot be made, written or renamed (no permission, disk full, ...).
    """
    target = _target(path)
    # In the same folder, since a rename is only atomic within a file system; a short name of its own, since
    # the target's name may already be as long as the file system allows.
    beside = target.parent / f".eplb-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(beside, "xb") as file:
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        raise FormatError(path, EXPECTED, error.strerror or str(error)) from error


def _target(path: Path) -> Path:
    """The file behind `path`: through a symbolic link, so that the link stays one."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # a new file; what is wrong with its folder is told elsewhere
        pass
    except OSError as error:  # no permission on the folder, a name too long, links in a circle
        raise FormatError(path, EXPECTED, error.strerror or str(error)) from error
    return Path(os.path.realpath(path))
