"""SGLang's own EPLBManager, metadata and updater on three gloo ranks of a CPU: `python sglang_ranks.py FOLDER`.

Replaced, because no server runs: the configuration, the recorder that counts tokens, and the device's module. Planning,
hooks, metadata, transfers and commit are SGLang's own code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, distributed

from eplb_triton import Placement, Topology
from eplb_triton.formats import LoadSeries, read_loads, write_map
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

STEPS = 4
"""Steps of a recorded window, and passes between two plans."""
LOCATION = "sglang.srt.eplb.expert_location"


class Configuration:
    """What SGLang reads of its server's arguments."""

    def __init__(self) -> None:
        self.moe = SimpleNamespace(
            ep_num_redundant_experts=REPLICAS - EXPERTS,
            ep_join_mode=None,
            eplb_algorithm="auto",
            ep_dispatch_algorithm="static",
            moe_a2a_backend="none",
            eplb_rebalance_layers_per_chunk=2,
            eplb_rebalance_num_iterations=STEPS,
            expert_distribution_recorder_buffer_size=STEPS,
            eplb_min_rebalancing_utilization_threshold=1.0,
        )
        self.parallel = SimpleNamespace(
            ep_size=RANKS,
            tp_size=RANKS,
            tp_rank=0,
            nnodes=1,
            elastic_ep_initial_size=None,
            ep_join_rank_offset=0,
            max_ep_size=None,
        )

    def in_place(self) -> None:
        """Have every module of SGLang ask this."""
        context = import_module("sglang.srt.runtime_context")
        for name, answer in (
            ("get_exec", SimpleNamespace(moe=self.moe)),
            ("get_parallel", self.parallel),
            ("get_device", SimpleNamespace(device="cpu")),
        ):
            _everywhere(getattr(context, name), answer)


def _everywhere(getter: object, answer: object) -> None:
    """Let every module that has this getter have another, that gives `answer`."""

    def other() -> object:
        return answer

    for name, module in list(sys.modules.items()):
        for attribute, value in list(vars(module).items()) if name.startswith("sglang") else []:
            if value is getter and isinstance(module, ModuleType):
                setattr(module, attribute, other)


class Serving:
    """One rank of an engine: a manager, and weights that it moves."""

    def __init__(self, rank: int, seed: int = 0) -> None:
        self.rank, self.seed, self.passes = rank, seed, 0
        self.totals: list[int] = []  # tokens of each pass on all ranks
        self.location, recorder = import_module(LOCATION), import_module("sglang.srt.eplb.expert_distribution")
        self.weights = weights_of(of_rank(in_order(), rank))
        manager = import_module("sglang.srt.eplb.eplb_manager")
        updater = import_module("sglang.srt.eplb.expert_location_updater").ExpertLocationUpdater()
        live = self.location.ExpertLocationMetadata.init_trivial(None, rank)
        self.location.set_global_expert_location_metadata(live, allow_overwrite=True)
        self._accumulator = recorder._StatAccumulator(live, rank)
        import_module("sglang.srt.runtime_context").get_resources().expert_distribution_recorder = self
        model = SimpleNamespace(routed_experts_weights_of_layer=dict(enumerate(self.weights)))
        self.manager = manager.EPLBManager(
            model_config=None,
            get_model=lambda: model,
            get_expert_location_updater=lambda: updater,
            get_expert_backup_client=lambda: None,
            get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=None),
        )

    recording = True

    def dump_record(self, output_mode: str) -> Any:
        """As SGLang's recorder: of its accumulator, which starts anew."""
        made = self._accumulator.dump(output_mode)
        self._accumulator.reset()
        return made

    def run(self, passes: int) -> None:
        """Serve: tokens of a pass, then the manager's turn."""
        for _ in range(passes):
            live = self.location.get_global_expert_location_metadata().physical_to_logical_map
            counts = shifting_loads(live, self.passes, self.rank, self.seed).int()
            self._accumulator.append(self.passes, "primary", {"global_physical_count": counts}, {})
            total = counts.sum()
            distributed.all_reduce(total)
            self.totals.append(int(total))
            self.manager.on_forward_pass_end()
            self.passes += 1

    def found(self) -> dict[str, Any]:
        live = self.location.get_global_expert_location_metadata()
        slots = live.physical_to_logical_map
        table, count = loop_of_maps(slots, EXPERTS)
        table = torch.nn.functional.pad(table, (0, REPLICAS - table.shape[2]), value=-1)
        got, dispatch = live.logical_to_all_physical_map, live.logical_to_rank_dispatch_physical_map
        experts = torch.arange(EXPERTS).expand(LAYERS, -1)
        return {
            "map": slots.tolist(),
            "cpu": torch.equal(slots, live.physical_to_logical_map_cpu),
            "wrong": wrong_slots(self.weights, of_rank(slots, self.rank)),
            "maps fit": torch.equal(got.sort(2).values, table.sort(2).values)  # its own planner's are in another order
            and bool(((got >= 0).long().diff(dim=2) <= 0).all())
            and torch.equal(live.logical_to_all_physical_map_num_valid, count),
            "dispatch": torch.equal(slots.gather(1, dispatch), experts),
            "near": _near(slots, dispatch, self.rank),
        }


def _near(slots: Tensor, dispatch: Tensor, rank: int) -> bool:
    """Whether every expert that this rank holds is served by this rank."""
    held = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool).scatter_(1, of_rank(slots, rank), True)
    return bool((dispatch // (REPLICAS // RANKS) == rank)[held].all())


def scenarios(rank: int) -> dict[str, Any]:
    """All scenarios in turn."""
    heard, registry = Heard(), import_module("sglang.srt.plugins.hook_registry").HookRegistry
    recorder: Any = import_module("sglang.srt.eplb.expert_distribution")
    recorder.reports_expert_balancedness = lambda: False
    hooked = registry._hooks["sglang.srt.eplb.eplb_algorithms.rebalance_experts"]
    replanner = hooked[0][1].__self__.replanner
    configuration = Configuration()
    configuration.parallel.tp_rank = rank
    configuration.in_place()
    found: dict[str, Any] = {"hooks": sorted(registry._patched)}

    def keep(name: str, serving: Serving) -> None:
        found[name] = {"models": [serving.found()], "lines": heard.taken()}

    serving = Serving(rank)
    histories: list[Tensor] = []
    with replaced(replanner, "_loads", _heard_by(replanner._loads, histories)):
        serving.run(6 * STEPS)
    keep("plans", serving)
    found["passes"] = [[serving.totals.index(int(step.sum())) for step in history] for history in histories]
    configuration.parallel.nnodes = RANKS  # dispatch knows nodes, and groups do not fit them: planned globally
    serving.run(2 * STEPS)
    keep("a node a rank", serving)
    configuration.parallel.nnodes = 1
    with replaced(replanner, "_by", planted(replanner._by) if rank == 1 else replanner._by):
        other = Serving(rank)
        other.run(2 * STEPS + 2)
        keep("another plan on rank 1", other)
    for way in ("elasticity_aware", "deepseek"):
        configuration.moe.eplb_algorithm = way
        serving = Serving(rank)
        serving.run(2 * STEPS + 2)
        keep(way, serving)
    configuration.moe.eplb_algorithm = "auto"
    switches(rank, replanner, keep)
    found["files"] = files(rank, configuration)
    return found


def files(rank: int, configuration: Configuration) -> dict[str, bool]:
    """Whether we read what its recorder writes, and it what we write."""
    recorder: Any = import_module("sglang.srt.eplb.expert_distribution")
    location = import_module(LOCATION)
    folder = Path(os.environ["EPLB_REAL_STOP"]).parent
    live = location.ExpertLocationMetadata.init_trivial(None, rank)
    of_ranks = [[shifting_loads(in_order(), step, each) for step in range(STEPS)] for each in range(RANKS)]
    tokens = torch.stack([torch.stack(steps) for steps in of_ranks]).sum(0)
    want = torch.zeros(STEPS, LAYERS, EXPERTS, dtype=torch.int64)
    want.scatter_add_(2, in_order().expand(STEPS, -1, -1), tokens)
    found = {}
    for name in ("_StatAccumulator", "_DetailAccumulator"):
        os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(folder / name)
        accumulator = getattr(recorder, name)(live, rank)
        for number, counts in enumerate(of_ranks[rank]):
            accumulator.append(number, "primary", {"global_physical_count": counts.int()}, {})
        accumulator.dump("file")
        distributed.barrier()
        dumps = sorted((folder / name).iterdir())
        series = read_loads(dumps[0] if len(dumps) == 1 else folder / name)
        found[name] = isinstance(series, LoadSeries) and series.steps.tolist() == want.tolist()
    topology = Topology(num_replicas=REPLICAS, num_gpus=RANKS)
    placement = Placement.from_phy2log(in_order().flip(1).contiguous(), EXPERTS, topology)
    for suffix in ("json", "pt"):
        path = folder / f"{rank}.{suffix}"
        write_map(path, placement, "sglang")
        configuration.moe.init_expert_location = str(path)
        made = location.compute_initial_expert_location_metadata(None, rank)
        found[suffix] = torch.equal(made.physical_to_logical_map, placement.phy2log)
    return found


def _heard_by(loads: Callable[..., Any], histories: list[Tensor]) -> Callable[..., Any]:
    """`loads`, which keeps what it gives."""

    def heard(history: Callable[[], Tensor]) -> Any:
        histories.append(history())
        return loads(history)

    return heard


def switches(rank: int, replanner: Any, keep: Callable[[str, Serving], None]) -> None:
    """Shadow, and a stop file that is on one rank only."""
    settings = replanner.settings
    with replaced(replanner, "settings", settings.__class__(**vars(settings) | {"shadow": True})):
        serving = Serving(rank)
        serving.run(2 * STEPS + 2)
        keep("shadow", serving)
    stop = Path(f"{os.environ['EPLB_REAL_STOP']}-{rank}")
    with replaced(replanner, "settings", settings.__class__(**vars(settings) | {"stop_file": stop})):
        serving = Serving(rank)
        if rank == 1:
            stop.touch()
        serving.run(2 * STEPS + 2)
        keep("stop file", serving)
        stop.unlink(missing_ok=True)
        serving.run(2 * STEPS)
        keep("after the stop file", serving)


def without_torchvision() -> None:
    """Let models of images be imported: torchvision has no wheel for every torch, and nothing here uses it."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
        if name not in sys.modules:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])


def dispatch_seconds() -> list[float]:
    """Seconds of our map of static dispatch and of SGLang's, for 58 layers of 256 experts on 32 ranks."""
    configuration = Configuration()
    configuration.parallel.ep_size, configuration.parallel.nnodes = 32, 4
    configuration.in_place()
    ours = import_module(LOCATION).compute_logical_to_rank_dispatch_physical_map
    table, _ = loop_of_maps((torch.arange(288) % 256).repeat(58, 1), 256)
    seconds = []
    for function in (ours, ours.__wrapped__):
        started = time.thread_time()
        function(logical_to_all_physical_map=table, ep_size=32, num_physical_experts=288, ep_rank=3)
        seconds.append(time.thread_time() - started)
    return seconds


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ |= {"EPLB_TRITON_SGLANG": "1"}
    torch.set_num_threads(1)
    offer_entry_point("sglang.srt.plugins")
    torch.get_device_module = lambda *_: SimpleNamespace(empty_cache=int, synchronize=int)  # type: ignore[assignment]
    for module in ("expert_location", "expert_location_updater", "eplb_manager"):
        import_module(f"sglang.srt.eplb.{module}")
        without_torchvision()
    elastic: Any = import_module("sglang.srt.elastic_ep.elastic_ep").ElasticEPStateManager
    elastic._select_device = staticmethod(partial(torch.device, "cpu"))
    model_config: Any = import_module(LOCATION).ModelConfigForExpertLocation
    model_config.from_model_config = lambda _: model_config(LAYERS, EXPERTS, GROUPS)
    import_module("sglang.srt.plugins").load_plugins()
    print_as_json({"seconds": dispatch_seconds()})
    print_as_json(answers_of(scenarios, RANKS, 240))
