"""vLLM's own EplbState on three gloo ranks of a CPU, planned through the entry point: `python vllm_ranks.py FOLDER`.

A CPU has no streams and events: those are replaced by ones that do nothing. Everything of the load balancer (window,
all-reduce, call of the policy, worker thread, transfers, commit of maps) is vLLM's own code.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

from tests.serving.frameworks import loop_of_maps
from tests.serving.real.ranks import Heard, answers_of, offer_entry_point, planted, print_as_json, replaced
from tests.serving.real.stub_model import (
    EXPERTS,
    GROUPS,
    LAYERS,
    RANKS,
    REPLICAS,
    in_order,
    of_rank,
    shifting_loads,
    weights_of,
    wrong_slots,
)

INTERVAL = 4
"""Steps between two plans."""


class Event:
    """Of a stream on a CPU: everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        """Nothing."""

    synchronize = wait

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def without_accelerator() -> None:
    """Replace what a CPU has not."""
    torch.Event = torch.Stream = Event  # type: ignore[assignment,misc]
    for name in ("set_stream", "set_device_index", "current_accelerator"):
        setattr(torch.accelerator, name, lambda *_: None)
    torch.accelerator.current_stream = lambda *_: Event()  # type: ignore[assignment]
    for name in ("eplb_communicator", "eplb_state"):
        module: Any = import_module(f"vllm.distributed.eplb.{name}")
        module.PIN_MEMORY = False


class Model:
    """What EplbState reads of a model."""

    def __init__(self, rank: int, slots: Tensor) -> None:
        self.num_moe_layers, self.num_logical_experts = LAYERS, EXPERTS
        self.num_routed_experts, self.num_shared_experts = EXPERTS, 0
        self.num_redundant_experts, self.num_physical_experts = REPLICAS - EXPERTS, REPLICAS
        self.num_local_physical_experts, self.num_expert_groups = REPLICAS // RANKS, GROUPS
        self.moe_layers: list[Any] = []
        self.expert_weights = weights_of(of_rank(slots, rank))

    def set_eplb_state(self, *_: Any) -> None:
        """Nothing: no layer reads the maps here."""


class Serving:
    """One rank of an engine: an EplbState of one model or more."""

    def __init__(self, rank: int, *, is_async: bool = False, names: tuple[str, ...] = ("main",), batched: bool = False):
        config = import_module("vllm.config.parallel").EPLBConfig(
            window_size=INTERVAL,
            step_interval=INTERVAL,
            num_redundant_experts=REPLICAS - EXPERTS,
            use_async=is_async,
            communicator="torch_gloo",
            enable_migration_batching=batched,
        )
        parallel = SimpleNamespace(eplb_config=config, enable_elastic_ep=False, num_ubatches=0)
        self.rank, self.is_async = rank, is_async
        self.state = import_module("vllm.distributed.eplb.eplb_state").EplbState(parallel, torch.device("cpu"))
        self.state.device_index = 0
        for name in names:
            self.state.add_model(Model(rank, in_order()), SimpleNamespace(model=name, compute_hash=partial(str, name)))
        if is_async:
            self.state.start_async_loop()

    def run(self, steps: int, seeds: tuple[int, ...] = (0,)) -> None:
        """Serve: tokens of `seeds`, one a model, then a step of the balancer."""
        for step in range(steps):
            for model, seed in zip(self.models(), seeds, strict=True):
                slots = model.physical_to_logical_map
                model.expert_load_pass.copy_(shifting_loads(slots, step, self.rank, seed))
            self.state.step()
            self.settle()

    def settle(self) -> None:
        """With the worker thread: steps of no tokens until its plan is committed, so that runs are alike."""
        while self.is_async and any(model.rebalanced for model in self.models()):
            time.sleep(0.005)
            self.state.expert_rearrangement_step -= 1
            self.state.step(is_dummy=True)

    def models(self) -> list[Any]:
        return list(self.state.model_states.values())

    def found(self) -> list[dict[str, Any]]:
        """Of each model: its map, the slots whose weights are wrong, and whether the maps belong together."""
        answers = []
        for model in self.models():
            slots, table = model.physical_to_logical_map, model.logical_to_physical_map
            count = model.logical_replica_count
            want, counts = loop_of_maps(slots, EXPERTS)
            width = want.shape[2]
            own = torch.equal(table[..., :width], want) and bool((table[..., width:] == -1).all())
            held = of_rank(slots, self.rank)  # nothing where the rank has left
            answers.append(
                {
                    "map": slots.tolist(),
                    "wrong": wrong_slots(model.model.expert_weights, held),
                    "maps fit": own and torch.equal(count, counts),
                    "dispatch": dispatched(table, count, slots),
                }
            )
        return answers


def dispatched(table: Tensor, count: Tensor, slots: Tensor) -> bool:
    """Whether a token of any hash comes to a slot of its expert, as vLLM takes entry hash % count."""
    experts = torch.arange(EXPERTS).view(1, -1).expand(LAYERS, -1)
    return all(
        torch.equal(slots.gather(1, table.gather(2, (number % count).unsqueeze(2)).squeeze(2)), experts)
        for number in range(64)
    )


def in_one_process() -> dict[str, Any]:
    """Ours and vLLM's `compute_logical_maps`, in one process: results on 1,000 random maps, least seconds of five; and
    the variables that vLLM copies to Ray's workers.
    """
    state = import_module("vllm.distributed.eplb.eplb_state")
    ours, own = state.compute_logical_maps, import_module("eplb_triton.integrations.vllm")._OWN["compute_logical_maps"]
    draw, equal, seconds = torch.Generator().manual_seed(0), 0, {}
    for case in range(1000):
        layers, experts, width = (int(torch.randint(1, most, (), generator=draw)) for most in (4, 12, 24))
        slots = torch.randint(-1 if case % 2 else 0, experts, (layers, width), generator=draw)
        slots = slots[0] if case % 3 == 0 else slots
        pairs = zip(ours(slots, experts), own(slots, experts), strict=True)
        equal += all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in pairs)
    for layers in (1, 58):
        slots = (torch.arange(288) % 256).repeat(layers, 1)
        seconds[layers] = [min(_seconds(partial(f, slots, 256)) for _ in range(5)) for f in (ours, own)]
    copied = import_module("vllm.ray.ray_env").get_env_vars_to_copy()
    return {"module": ours.__module__, "equal": equal, "seconds": seconds, "ray": sorted(copied)}


def _seconds(call: Any) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def scenarios(rank: int) -> dict[str, Any]:
    """All scenarios in turn; the worker threads of the asynchronous ones wait until the process ends."""
    heard, policy = Heard(), import_module("vllm.distributed.eplb.policy").EPLB_POLICIES["default"]
    replanner = policy.replanner
    parallel: Any = import_module("vllm.distributed.parallel_state")
    for name in ("_WORLD", "_EP", "_EPLB"):
        setattr(parallel, name, parallel.GroupCoordinator([list(range(RANKS))], 0, "gloo", False, group_name=name))
    parallel._NODE_COUNT = 1
    found: dict[str, Any] = {"policy": policy.__module__}

    def keep(name: str, serving: Serving) -> None:
        found[name] = {"models": serving.found(), "lines": heard.taken()}

    profiled = Serving(rank)
    profiled.state.step(is_profile=True)
    keep("profile", profiled)
    for way in ("sync", "async"):
        is_async = way == "async"
        serving = Serving(rank, is_async=is_async)
        serving.run(6 * INTERVAL)
        keep(way, serving)
        with replaced(replanner, "_by", planted(replanner._by) if rank == 1 else replanner._by):
            other = Serving(rank, is_async=is_async)
            other.run(2 * INTERVAL)
            keep(f"{way}, another plan on rank 1", other)
        for seed in (1, 2):
            alone = Serving(rank, is_async=is_async)
            alone.run(4 * INTERVAL, (seed,))
            keep(f"{way}, model {seed} alone", alone)
        both = Serving(rank, is_async=is_async, names=("main", "draft"))
        both.run(4 * INTERVAL, (1, 2))
        keep(f"{way}, two models", both)
    batched = Serving(rank, is_async=True, batched=True)
    batched.run(4 * INTERVAL)
    keep("async, batched", batched)
    switches(rank, replanner, keep)
    with_split(rank, policy, keep)
    elastic(rank, parallel, keep)
    return found


def with_split(rank: int, policy: Any, keep: Any) -> None:
    """Logical maps whose entries repeat by the last loads."""
    weighted = import_module("eplb_triton.integrations.weighted_maps").WeightedMaps()
    with replaced(policy, "weighted", weighted):
        serving = Serving(rank, is_async=True, names=("main", "draft"))
        serving.run(2 * INTERVAL, (1, 2))
        keep("split", serving)


def switches(rank: int, replanner: Any, keep: Any) -> None:
    """Shadow, and a stop file that is on one rank only."""
    settings = replanner.settings
    with replaced(replanner, "settings", settings.__class__(**vars(settings) | {"shadow": True})):
        serving = Serving(rank)
        serving.run(2 * INTERVAL)
        keep("shadow", serving)
    stop = Path(f"{os.environ['EPLB_REAL_STOP']}-{rank}")
    with replaced(replanner, "settings", settings.__class__(**vars(settings) | {"stop_file": stop})):
        serving = Serving(rank)
        serving.run(2 * INTERVAL)
        keep("before the stop file", serving)
        if rank == 1:
            stop.touch()
        serving.run(2 * INTERVAL)
        keep("stop file", serving)
        stop.unlink(missing_ok=True)
        serving.run(2 * INTERVAL)
        keep("after the stop file", serving)


def elastic(rank: int, parallel: Any, keep: Any) -> None:
    """The last rank joins with empty slots, then leaves: over vLLM's groups for that, which torch does not register."""
    serving = Serving(rank)  # its communicator is gloo's, which vLLM does not make over such groups
    (model,) = serving.models()
    serving.run(1)
    stateless = import_module("vllm.distributed.stateless_coordinator").StatelessGroupCoordinator
    store = distributed.distributed_c10d._get_default_store()
    for name in ("_EP", "_EPLB"):
        group = stateless([list(range(RANKS))], 0, "gloo", False, store, group_name=f"elastic{name}", global_rank=rank)
        setattr(parallel, name, group)
    joined = in_order()
    joined[:, -REPLICAS // RANKS :] = -1
    model.physical_to_logical_map.copy_(joined)
    model.model.expert_weights[:] = weights_of(of_rank(joined, rank))
    serving.state.rearrange()
    keep("scale up", serving)
    serving.state.rearrange(rank_mapping={0: 0, 1: 1, 2: -1}, use_last_expert_load=True)
    keep("scale down", serving)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ |= {"EPLB_TRITON_VLLM": "1", "VLLM_PLUGINS": "eplb_triton"}
    torch.set_num_threads(1)
    offer_entry_point("vllm.general_plugins")
    without_accelerator()
    import_module("vllm.plugins").load_general_plugins()
    configuration = import_module("vllm.config.logging").LoggingConfig()
    import_module("vllm.logger").configure_logging(configuration)  # as an engine does after it has loaded plugins
    print_as_json(in_one_process())
    print_as_json(answers_of(scenarios, RANKS, 240))
