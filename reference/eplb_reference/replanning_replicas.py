"""Replanning: moves that give an expert of the heaviest GPU one replica more, in place of one of another expert."""

from __future__ import annotations

import torch
from torch import Tensor

from eplb_reference.replanning_potential import Judge, Replicas, State, powers, replicas_of, scores
from eplb_triton.topology import Topology


def best_replica_move(
    state: State, judge: Judge, topology: Topology, heaviest: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest gain [L] of such a move on the node of the heaviest GPU [L], the slot [L] it writes and the expert
    [L] that comes there; the gain is 0 where there is none above `floor` [L].

    The expert has fewer replicas than its node has GPUs; the other keeps at least one. It is passed over if one replica
    more, not yet received by any GPU, gains no more than `floor`.

    Ties: the expert in the lowest slot, then the lowest donor, then the lowest receiver; its lowest slot of the donor.
    """
    num_layers, d, s = len(heaviest), topology.gpus_per_node, topology.slots_per_gpu
    node = _Node(state, judge, topology, heaviest)
    wanted = _wanted(state, node, topology, heaviest, floor)  # [L, S]
    own = state.phy2log.view(num_layers, -1, s)[torch.arange(num_layers, dtype=torch.int64, device="cpu"), heaviest]
    donors = (node.held > 0).any(1) & (state.counts >= 2)  # [L, E]
    layer, i, donor = (wanted.unsqueeze(2) & donors.unsqueeze(1)).nonzero(as_tuple=True)  # pairs
    expert = own[layer, i]
    layer, expert, donor = (values[expert != donor] for values in (layer, expert, donor))
    less, more = node.replicas(layer, donor, -1), node.replicas(layer, expert, +1)
    given, kept = node.held[layer, :, donor], node.held[layer, :, expert]  # [pairs, d]

    pair, gpu = ((given > 0) | (kept > 0)).nonzero(as_tuple=True)  # GPUs that hold one of the two
    change = _Change.none(node, layer[pair], gpu)
    change.add(given[pair, gpu], less, node.replicas(layer, donor, 0), pair)
    change.add(kept[pair, gpu], more, node.replicas(layer, expert, 0), pair)
    fall = change.fall()
    falls = torch.zeros(len(layer), dtype=torch.int64, device="cpu").index_add_(0, pair, fall)  # nobody receives yet
    receives = kept[pair, gpu] == 0
    change = change.only(receives)
    pair, gpu = pair[receives], gpu[receives]
    one = torch.ones_like(pair)
    change.add(one, more, less, pair)
    gains = falls[pair] - fall[receives] + change.fall()

    layers = layer[pair]
    best = torch.zeros(num_layers, dtype=torch.int64, device="cpu").scatter_reduce_(0, layers, gains, "amax")
    best = torch.where(best > floor, best, 0)
    place = torch.where(gains == best[layers], torch.arange(len(gains), dtype=torch.int64, device="cpu"), len(gains))
    first = torch.full_like(best, len(gains)).scatter_reduce_(0, layers, place, "amin")
    found = best > 0
    slot, arrives = torch.zeros_like(best), torch.zeros_like(best)
    chosen = first[found]
    arrives[found] = expert[pair[chosen]]
    receiver = heaviest[found] // d * d + gpu[chosen]
    held = state.phy2log.view(num_layers, -1, s)[found, receiver]  # [found, S]
    slot[found] = receiver * s + (held == donor[pair[chosen]].unsqueeze(1)).to(torch.int8).argmax(1)
    return best, slot, arrives


def _wanted(state: State, node: _Node, topology: Topology, heaviest: Tensor, floor: Tensor) -> Tensor:
    """[L, S] bool: slots of the heaviest GPU whose expert, at its first slot there, is worth another replica."""
    num_layers, s = len(heaviest), topology.slots_per_gpu
    own = state.phy2log.view(num_layers, -1, s)[torch.arange(num_layers, dtype=torch.int64, device="cpu"), heaviest]
    earlier = torch.ones(s, s, dtype=torch.bool, device="cpu").tril(-1)
    again = ((own.unsqueeze(2) == own.unsqueeze(1)) & earlier).any(2)
    wanted = ~again & (state.counts.gather(1, own) < topology.gpus_per_node)
    layer, i = wanted.nonzero(as_tuple=True)
    expert = own[layer, i]
    held = node.held[layer, :, expert]
    item, gpu = (held > 0).nonzero(as_tuple=True)
    change = _Change.none(node, layer[item], gpu)
    change.add(held[item, gpu], node.replicas(layer, expert, +1), node.replicas(layer, expert, 0), item)
    falls = torch.zeros(len(layer), dtype=torch.int64, device="cpu").index_add_(0, item, change.fall())
    wanted[layer, i] = falls > floor[layer]
    return wanted


class _Node:
    """The node of each layer's heaviest GPU."""

    def __init__(self, state: State, judge: Judge, topology: Topology, heaviest: Tensor) -> None:
        num_layers, num_experts = state.counts.shape
        d = topology.gpus_per_node
        rows = torch.arange(num_layers, dtype=torch.int64, device="cpu").unsqueeze(1)
        gpus = (heaviest // d * d).unsqueeze(1) + torch.arange(d, dtype=torch.int64, device="cpu")  # [L, d]
        experts = state.phy2log.view(num_layers, topology.num_gpus, -1)[rows, gpus]
        self.held = torch.zeros(num_layers, d, num_experts, dtype=torch.int64, device="cpu")  # replicas on each GPU
        self.held.scatter_add_(2, experts, torch.ones_like(experts))
        self.gpus = [values[rows, gpus] for values in state.gpus]  # loads, mean, square, spread
        self.power = state.potential.power[rows, gpus]
        self.top, self.judge, self.counts = state.potential.top, judge, state.counts

    def replicas(self, layer: Tensor, expert: Tensor, more: int) -> Replicas:
        """One replica each of some experts, were there `more` of them."""
        counts = self.counts[layer, expert] + more
        return replicas_of(self.judge.samples[layer, expert], counts, self.judge.num_samples[layer])


class _Change:
    """What some GPUs of the node would carry."""

    def __init__(self, node: _Node, layer: Tensor, gpu: Tensor, loads: Tensor, spread: Tensor) -> None:
        self.node, self.layer, self.gpu, self.loads, self.spread = node, layer, gpu, loads, spread

    @classmethod
    def none(cls, node: _Node, layer: Tensor, gpu: Tensor) -> _Change:
        """What they carry now."""
        loads, _, _, spread = node.gpus
        return cls(node, layer, gpu, loads[layer, gpu], spread[layer, gpu])

    def only(self, which: Tensor) -> _Change:
        """Some of them, as changed so far."""
        return _Change(self.node, *(part[which] for part in (self.layer, self.gpu, self.loads, self.spread)))

    def add(self, times: Tensor, new: Replicas, old: Replicas, item: Tensor) -> None:
        """Put `new` replicas in place of `old` ones, `times` on each GPU; `item`: which of them."""
        self.loads.addcmul_(times.unsqueeze(1), (new.loads - old.loads)[item])
        self.spread.addcmul_(times, (new.spread - old.spread)[item])

    def fall(self) -> Tensor:
        """How far the power of each falls."""
        judge, layer = self.node.judge, self.layer
        sums = self.loads.sum(1), self.loads.square().sum(1), self.spread
        score = scores(*sums, judge.num_samples[layer], judge.z)
        return self.node.power[layer, self.gpu] - powers(score, self.node.top[layer], judge.norm)
