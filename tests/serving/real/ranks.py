"""Forked ranks over gloo, and what they log: the frameworks are imported once, in the process that forks."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import distributed

MARK = "found: "


class Heard(logging.Handler):
    """Keeps the lines of this package."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logger = logging.getLogger("eplb_triton")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def planted(made: Callable[..., Any]) -> Callable[..., Any]:
    """The plans of this rank with two experts exchanged in layer 0: valid, and not those of the other ranks."""

    def plan(*args: Any) -> Any:
        plan_of_rank = made(*args)
        slots = plan_of_rank.placement.phy2log
        other = int((slots[0] != slots[0, 0]).nonzero()[-1])
        slots[0, [0, other]] = slots[0, [other, 0]]
        plan_of_rank.placement.refresh()
        return plan_of_rank

    return plan


def offer_entry_point(group: str) -> None:
    """Let loaders of plugins find this project's entry point of a group, whatever of it is installed here."""
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    entry = project.split(f'[project.entry-points."{group}"]\n')[1].splitlines()[0].replace('"', "")
    folder = Path(tempfile.mkdtemp())
    info = folder / "offered-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    sys.path.insert(0, str(folder))


def print_as_json(found: Any) -> None:
    """One line, for `answers_of_program`."""
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


def answers_of_program(name: str, folder: str, **environment: str) -> list[Any]:
    """What a program of this folder finds, run in a process of its own; last, all else that it prints.

    Raises:
        AssertionError: it failed, with what it wrote.
    """
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", f"tests.serving.real.{name}", folder],
        capture_output=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'reference'}", **environment},
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    found = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    return [*found, [line for line in (*lines, *done.stderr.splitlines()) if not line.startswith(MARK)]]


def answers_of(function: Callable[[int], dict[str, Any]], ranks: int, seconds: float) -> list[Any]:
    """What function(rank) finds on each rank; a string for one that raised or hangs."""
    context = multiprocessing.get_context("fork")
    answers, store = context.Queue(), Path(tempfile.mkdtemp()) / "store"
    processes = [context.Process(target=_rank, args=(function, rank, ranks, store, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(found) < ranks and time.monotonic() < end:
        with suppress(Empty):
            rank, value = answers.get(timeout=1)
            found[rank] = value
    for process in processes:
        process.join(2)
        if process.is_alive():
            process.kill()
    return [found.get(rank, "hangs") for rank in range(ranks)]


def _rank(function: Callable[[int], dict[str, Any]], rank: int, ranks: int, store: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        answers.put((rank, function(rank)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))
    finally:
        answers.close()
        answers.join_thread()
        os._exit(0)  # threads of the frameworks wait for ever
