"""A mixture-of-experts model whose experts are spread over ranks, and are moved while it runs.

    torchrun --nproc-per-node 4 examples/expert_parallel.py

Every rank holds the experts of its slots. A step sends each token to its experts and back (all-to-all); which replica
of an expert a token goes to is read from a table made of the loads of the last steps. Every few steps the ranks add up
what they have counted, replan from the placement in force, and make sure that all have the same plan; then, a layer
before each step, they move weights and go on with the new map of that layer. What users ask about changes now and then,
so that there is something to move for.

After every step rank 0 runs the whole model on the tokens of all ranks, in one process, and compares: outputs are equal
bit for bit, before, during and after replans. That can be asked because the model is quantised as W8A8 models are:
weights and activations are whole numbers of -127 to 127, so that every sum in a matrix product is a whole number below
2^24, exact in float32 in any order and on any machine; the outputs of a token's experts are then weighted and added by
the rank that the token came from, in the order of its gates.

Runs on a CPU over gloo, and on GPUs over NCCL where there is one for every rank. `--fault` plants a fault on the last
rank, at the second replan, to see what becomes of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from eplb_triton import Placement, Planner, Topology
from eplb_triton.serving import LoadWindow, MoveError, agree, move_weights, own_group

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 3, 16, 2, 32, 64
TOKENS = 96  # of a rank and step
SPARE_SLOTS = 2  # of a rank, beside its share of the experts
WIDTH = 16  # entries of an expert in the table that splits its tokens
PATIENCE = timedelta(minutes=5)  # a first plan compiles, on a busy machine; a rank that dies is noticed at once
FAULTS = ("none", "perturb", "other-map", "kill")


class Model(NamedTuple):
    """All weights, in float32 as whole numbers of -127 to 127."""

    router: Tensor  # [L, HIDDEN, E]
    w1: Tensor  # [L, E, HIDDEN, INNER]
    w2: Tensor  # [L, E, INNER, HIDDEN]

    @classmethod
    def drawn(cls, device: torch.device) -> Model:
        shapes = (LAYERS, HIDDEN, EXPERTS), (LAYERS, EXPERTS, HIDDEN, INNER), (LAYERS, EXPERTS, INNER, HIDDEN)
        generator = torch.Generator().manual_seed(0)
        return cls(*(torch.randint(-127, 128, shape, generator=generator).float().to(device) for shape in shapes))


def tokens_of(step: int, rank: int) -> Tensor:
    """[TOKENS, HIDDEN]: most are near the one of four topics that is asked about now, which changes every 12 steps."""
    topics = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1_000_003 + 1000 * step + rank)
    topic = torch.randint(4, (TOKENS,), generator=generator)
    topic = torch.where(torch.rand(TOKENS, generator=generator) < 0.6, step // 12 % 4, topic)
    return quantised(topics[topic] + 0.7 * torch.randn(TOKENS, HIDDEN, generator=generator))


def quantised(x: Tensor) -> Tensor:
    """Rows scaled and rounded to whole numbers of -127 to 127."""
    return (x * (127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-6))).round()


def chosen(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """The TOP_K experts of each token, and the weight of each; of equal scores the lowest expert first."""
    scores, ids = (x @ router).sort(dim=1, descending=True, stable=True)
    score = scores[:, :TOP_K] - scores[:, TOP_K : TOP_K + 1] + 1
    return ids[:, :TOP_K].contiguous(), score / score.sum(1, keepdim=True)


def expert(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """What one expert makes of some tokens: whole numbers."""
    inner = (x @ w1).relu() / 4096
    return inner.floor().clamp(max=127) @ w2


def combined(x: Tensor, outputs: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer, the experts' [tokens, TOP_K, HIDDEN] added in the order of the gates; the next input."""
    total = gates[:, :1] * outputs[:, 0]
    for nth in range(1, TOP_K):
        total = total + gates[:, nth : nth + 1] * outputs[:, nth]
    return total, quantised(x + quantised(total))


def in_one_process(model: Model, x: Tensor) -> Tensor:
    """What the model makes of all tokens where one process has all experts."""
    total = x
    for layer in range(LAYERS):
        ids, gates = chosen(x, model.router[layer])
        outputs = torch.empty(len(x), TOP_K, HIDDEN, device=x.device)
        for number in range(EXPERTS):
            row, nth = (ids == number).nonzero(as_tuple=True)
            outputs[row, nth] = expert(x[row], model.w1[layer, number], model.w2[layer, number])
        total, x = combined(x, outputs, gates)
    return total


class Rank:
    """One rank: the experts of its slots, and what it needs to serve and to replan."""

    def __init__(self, backend: str, interval: int, device: torch.device) -> None:
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.size = -(-EXPERTS // self.ranks) + SPARE_SLOTS
        topology = Topology(num_replicas=self.size * self.ranks, num_gpus=self.ranks)
        for turn in range(2):  # rank 0 compiles; the others find what it compiled
            if (self.rank > 0) == turn:
                self.planner = Planner(
                    topology, LAYERS, EXPERTS, policy="steady", device=device, backend=backend,
                    loads_dtype=torch.int64, steps=interval,
                )  # fmt: skip
            distributed.barrier()
        self.live, self.ahead = self.planner.empty(), self.planner.empty()
        self.live.copy_(Placement.spread_in_order(LAYERS, EXPERTS, topology))
        self.window = LoadWindow(interval, LAYERS, EXPERTS, device)
        self.control = own_group(PATIENCE)
        self.model = Model.drawn(device)
        own = self.live.phy2log[:, self.rank * self.size : (self.rank + 1) * self.size]
        self.weights = [
            [self.model.w1[layer, own[layer]].to(torch.int8), self.model.w2[layer, own[layer]].to(torch.int8)]
            for layer in range(LAYERS)
        ]
        self.todo = self.ahead.transfers(self.live)
        self.to_deploy: list[int] = []  # layers whose new map is not in force yet, next first
        self.received = torch.zeros(LAYERS, self.ranks, dtype=torch.int64, device=device)
        self.follow_the_map(torch.ones(LAYERS, EXPERTS, dtype=torch.int64, device=device))

    def follow_the_map(self, loads: Tensor) -> None:
        """Split tokens over the replicas that are in force now, in proportion to what levels these loads."""
        self.loads = loads
        self.table = self.live.table(self.live.split(loads), WIDTH)

    def forward(self, step: int, x: Tensor) -> Tensor:
        """What the model makes of this rank's tokens."""
        self.window.advance()
        total = x
        for layer in range(LAYERS):
            ids, gates = chosen(x, self.model.router[layer])
            self.window.add(layer, ids)
            entry = (torch.arange(ids.numel(), device=x.device).view_as(ids) + step + self.rank) % WIDTH
            outputs = self.exchanged(layer, x, self.table[layer][ids, entry])
            total, x = combined(x, outputs, gates)
        return total

    def exchanged(self, layer: int, x: Tensor, slots: Tensor) -> Tensor:
        """[tokens, TOP_K, HIDDEN]: every token to the ranks of its slots, their experts' outputs back."""
        order = (slots // self.size).flatten().argsort(stable=True)
        sends = torch.bincount((slots // self.size).flatten(), minlength=self.ranks)
        takes = torch.empty_like(sends)
        distributed.all_to_all_single(takes, sends)
        self.received[layer, self.rank] = takes.sum()
        sizes = takes.tolist(), sends.tolist()
        their_slots = order.new_empty(sum(sizes[0]))
        distributed.all_to_all_single(their_slots, slots.flatten()[order], *sizes)
        theirs = x.new_empty(len(their_slots), HIDDEN)
        distributed.all_to_all_single(theirs, x[order // TOP_K], *sizes)
        made = torch.empty_like(theirs)
        w1, w2 = self.weights[layer]
        for within in range(self.size):
            mine = their_slots == self.rank * self.size + within
            made[mine] = expert(theirs[mine], w1[within].float(), w2[within].float())
        back, outputs = torch.empty_like(x[order // TOP_K]), x.new_empty(slots.numel(), HIDDEN)
        distributed.all_to_all_single(back, made, sizes[1], sizes[0])
        outputs[order] = back
        return outputs.view(*slots.shape, HIDDEN)

    def balancedness(self) -> float:
        """Of the last step: tokens of a rank, mean / largest, summed over the layers."""
        tokens = self.received.clone()
        self.received.zero_()
        distributed.all_reduce(tokens)
        return float(tokens.double().mean(1).sum() / tokens.amax(1).sum())

    def replan(self, fault: str) -> str:
        """Plan from the last steps; what came of it."""
        began = time.perf_counter()
        history = self.window.reduce()
        self.planner(history, out=self.ahead, previous=self.live)
        if fault == "other-map":
            self.ahead.phy2log[0, [0, -1]] = self.ahead.phy2log[0, [-1, 0]]
            self.ahead.refresh()
        verdict = agree(self.ahead.fingerprint(), self.control)
        self.follow_the_map(history.sum(0))
        if not verdict.agreed:
            return f"{verdict.reason}; the placement in force is kept"
        self.todo = self.ahead.transfers(self.live)
        self.to_deploy = [layer for layer in self.ahead.deployment_order().tolist() if layer >= 0]
        counts = self.todo.total()
        words = f"{counts['copied'] + counts['fetched']} slots to write, {counts['fetched']} of them from other ranks"
        return f"{words}, planned in {time.perf_counter() - began:.3f} s"

    def deploy(self, fault: str) -> str:
        """Move the weights of the next layer of a plan, and put its map in force."""
        if not self.to_deploy:
            return ""
        layer = self.to_deploy.pop(0)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        todo = self.todo.of(layer)
        moved = move_weights([self.weights[layer]], todo, control=self.control, timeout=PATIENCE.total_seconds())
        self.live.phy2log[layer].copy_(self.ahead.phy2log[layer])
        self.live.refresh()
        self.follow_the_map(self.loads)
        if fault == "perturb":
            self.perturb(layer, todo.batch[0])
        words = f"{moved.slots_fetched} slots fetched and {moved.slots_sent} sent by rank {self.rank}"
        return f"; before it layer {layer} moved, {words}, in {moved.seconds:.3f} s"

    def perturb(self, layer: int, batch: Tensor) -> None:
        """Change one weight of the first slot that this rank has fetched, if it has."""
        for within in (batch[self.rank * self.size :][: self.size] >= 0).nonzero().flatten().tolist()[:1]:
            weight = self.weights[layer][1][within]
            weight[0, 0] = -127 if weight[0, 0] >= 0 else 127


def serve(options: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> int:
    """Serve all steps; the exit status: 0 if every output was that of one process."""
    served = Rank(options.backend, options.interval, device)
    first, last = served.rank == 0, served.rank == served.ranks - 1
    wrong, replans, fault = 0, 0, "none"
    for step in range(options.steps):
        deployed = served.deploy(fault)
        began = time.perf_counter()
        output = served.forward(step, tokens_of(step, served.rank).to(device))
        level, seconds = served.balancedness(), time.perf_counter() - began
        everywhere = [torch.empty_like(output) for _ in range(served.ranks)]
        distributed.all_gather(everywhere, output)
        if first:
            tokens = torch.cat([tokens_of(step, rank) for rank in range(served.ranks)]).to(device)
            different = int((torch.cat(everywhere) != in_one_process(served.model, tokens)).sum())
            wrong += different > 0
            verdict = f"differs in {different} values from that of" if different else "equal to that of"
            say(f"step {step:3}: balancedness {level:.3f}, {seconds:.3f} s, output {verdict} one process{deployed}")
        if (step + 1) % options.interval == 0:
            replans += 1
            fault = options.fault if last and replans == 2 else "none"
            words = served.replan(fault)
            if first or not served.to_deploy:
                say(f"rank {served.rank}, replan {replans}: {words}")
    if first:
        say(f"{served.ranks} ranks, {options.steps} steps, {replans} replans; the output of {wrong} steps was wrong")
    return min(wrong, 1)


def _has_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--interval", type=int, default=8, help="steps between two plans, and of the history")
    parser.add_argument("--backend", default="auto", help="of the planner: auto, triton, cpu or reference")
    parser.add_argument("--fault", choices=FAULTS, default="none", help="planted on the last rank at the second replan")
    return parser.parse_args(arguments)


def main() -> int:
    """One rank, as torchrun starts it."""
    options = parsed()
    if "RANK" not in os.environ:
        print("start it by: torchrun --nproc-per-node 4 examples/expert_parallel.py", file=sys.stderr)
        return 2
    distributed.init_process_group("cpu:gloo,cuda:nccl" if _has_gpus() else "gloo", timeout=PATIENCE)
    device = torch.device("cpu")
    if _has_gpus():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        status = serve(options, device, lambda line: print(line, flush=True))
        distributed.barrier()
    except (MoveError, RuntimeError) as error:  # a rank has gone: the others say so, and end
        print(f"rank {distributed.get_rank()}: {error}", file=sys.stderr, flush=True)
        status = 1
    distributed.destroy_process_group()  # its threads would abort a process that ends before them
    return status


if __name__ == "__main__":
    sys.exit(main())
