"""Ranks in processes of their own, over gloo."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import distributed


def run_ranks(
    function: Callable[[int], Any], ranks: int, folder: Path, seconds: float = 120, dying: int | None = None
) -> list[Any]:
    """What function(rank) returns on each rank; of a server's forks, for a fork of a process with threads may hang. The
    rank `dying` ends itself before it returns: None for it.

    Raises:
        AssertionError: a rank raised, or did not answer in time; it is ended then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "eplb_reference", "eplb_triton"])  # imported once a test run
    answers = context.Queue()
    store = folder / "store"  # a file: no port that another test might take
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, str(store), answers, dying), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(ranks - (dying is not None)):
            rank, value, error = answers.get(timeout=seconds)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = value
    except Empty:
        raise AssertionError(f"ranks {sorted(set(range(ranks)) - set(found) - {dying})} hang") from None
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [found.get(rank) for rank in range(ranks)]


def _rank(function: Callable[[int], Any], rank: int, ranks: int, store: str, answers: Any, dying: int | None) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        answers.put((rank, function(rank), None))
        if dying is None:
            distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
