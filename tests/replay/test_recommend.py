"""`eplb-triton recommend`: the cheapest of what was tried, within the memory, and how to set it."""

from __future__ import annotations

import json
import re
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from eplb_triton.cli.options import EXAMPLE
from eplb_triton.cli.recommending import _slots_tried
from eplb_triton.formats import StepStream, open_steps
from eplb_triton.integrations.settings import read_settings
from eplb_triton.synthetic import serving_steps
from tests.commands import refused, run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    steps = [step.numpy() for step in serving_steps(80, 2, 16, tokens_per_step=2000, top_k=4, seed=5)]
    np.save(tmp_path / "steps.npy", np.stack(steps))
    return tmp_path / "steps.npy"


def test_what_it_says_can_be_set(trace: Path) -> None:
    status, out, err = run("recommend", trace, "--gpus", 4, "--slots-per-gpu", 6)
    assert (status, err) == (0, "")
    said = re.match(
        r"Run with (\d+) replicas, (\d+) of them redundant and (\d+) a GPU, planned by (\w+)(?: at a price of \S+)? "
        r"every (\d+) steps: it saves [\d.]+ % of the expert layers' time \(PAR [\d.]+ to [\d.]+\) and moves [\d.]+ ",
        out,
    )
    assert said
    replicas, redundant, slots, interval = (int(said[number]) for number in (1, 2, 3, 5))
    assert replicas == 16 + redundant == 4 * slots <= 24
    vllm, sglang = (next(line for line in out.splitlines() if word in line) for word in ("vllm serve", "sglang."))
    config = json.loads(shlex.split(vllm)[-1])
    assert (config["num_redundant_experts"], config["step_interval"]) == (redundant, interval)
    assert f"--ep-num-redundant-experts {redundant} --eplb-rebalance-num-iterations {interval}" in sglang
    for line in (vllm, sglang):
        variables = dict(word.split("=", 1) for word in shlex.split(line) if word.startswith("EPLB_TRITON_"))
        assert read_settings(variables).policy.name == said[4]
    assert "What was tried" in out


def test_slots_tried_begin_with_the_fewest_and_end_with_the_most() -> None:
    stream = StepStream((), 1, 256, 10, lambda: iter(()))
    assert _slots_tried(stream, 32, 8) == [8]
    assert _slots_tried(stream, 32, 10) == [8, 9, 10]
    assert _slots_tried(stream, 32, 20) == [8, 12, 16, 20]


def test_what_does_not_fit_is_refused(trace: Path) -> None:
    refused(
        run("recommend", trace, "--gpus", 4, "--slots-per-gpu", 3),
        "--slots-per-gpu 3 must be at least 4: 3 on each of 4 GPUs hold 12 of 16 experts",
    )
    refused(run("recommend", trace, "--gpus", 0, "--slots-per-gpu", 16), "num_gpus=0 must be at least 1")
    refused(run("recommend", trace, "--gpus", 4), "Missing option '--slots-per-gpu'")


def test_the_example_ships_and_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXAMPLE.stat().st_size <= 200_000
    stream = open_steps([EXAMPLE])
    assert (stream.length, stream.num_layers, stream.num_experts) == (1536, 3, 32)
    drawn = islice(serving_steps(2136, 3, 32, mixed=True, tokens_per_step=1024, top_k=4, seed=11), 600, None)
    assert sum(int(step.sum()) for step in stream) == pytest.approx(sum(int(step.sum()) for step in drawn), rel=1e-3)
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    refused(run("replay", "x.npy", "--gpus", 4), "expected at least 3 steps")
    Path("example").write_text("a file of the user's own goes before")
    refused(run("replay", "example", "--gpus", 4), "example: expected loads")
