"""Splitting, routing and transfers on the CPU, by Numba or by the reference, for tensors on any device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from eplb_triton.serving.checks import checked_counts


def classify(backend: str, phy2log: Tensor, num_gpus: int, classes: Tensor) -> None:
    """Fill `classes` [L, E]."""
    slots = _on_cpu(phy2log)
    if backend == "cpu":
        with _Filled(classes) as filled:
            _compiled().classify(slots, num_gpus, filled)
    else:
        classes.copy_(_reference("splitting").place_classes(slots, classes.shape[1], num_gpus))


def split(
    backend: str, counts: Tensor, phy2log: Tensor, classes: Tensor, num_gpus: int, rounds: int, quotas: Tensor
) -> None:
    """Fill `quotas` [L, P] from counts [L, E].

    Raises:
        ValueError: a count is none, or of an expert without a place.
    """
    whole, slots = checked_counts(counts.detach().cpu()), _on_cpu(phy2log)
    _check_placed(whole, slots)
    if backend == "cpu":
        with _Filled(quotas) as filled:
            _compiled().split(slots, _on_cpu(classes), whole, num_gpus, rounds, filled)
        return
    splitting = _reference("splitting")
    if whole.is_floating_point():
        whole, _ = splitting.whole_counts(whole)
    quotas.copy_(splitting.split_counts(slots, _on_cpu(classes), whole, num_gpus, rounds))


def route(
    backend: str,
    topk_ids: Tensor,
    layer: int,
    quotas: Tensor,
    phy2log: Tensor,
    num_experts: int,
    num_gpus: int,
    offsets: Tensor | None,
    salt: int | Tensor,
    slots: Tensor,
) -> None:
    """Fill `slots` [tokens, k].

    Raises:
        ValueError: an id is no expert and not -1.
    """
    ids, own, quota = _on_cpu(topk_ids), _on_cpu(phy2log[layer]), _on_cpu(quotas[layer])
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < num_experts):
        row, column = ((ids < -1) | (ids >= num_experts)).nonzero()[0].tolist()
        raise ValueError(
            f"topk_ids[{row}, {column}]={int(ids[row, column])} must be -1 to {num_experts - 1}; "
            "it is the first that is not"
        )
    before = None if offsets is None else _on_cpu(offsets[layer])
    number = int(salt)
    if backend == "cpu":
        with _Filled(slots) as filled:
            _compiled().route(ids, own, quota, before, num_experts, num_gpus, layer, number, filled)
    elif before is not None:
        slots.copy_(_reference("routing").exact_slots(ids, own, quota, before, num_gpus))
    else:
        slots.copy_(_reference("routing").hashed_slots(ids, own, quota, num_experts, num_gpus, layer, number))


def tabulate(backend: str, phy2log: Tensor, quotas: Tensor, num_gpus: int, table: Tensor) -> None:
    """Fill `table` [L, E, M]."""
    slots, quota = _on_cpu(phy2log), _on_cpu(quotas)
    _, num_experts, width = table.shape
    if backend == "cpu":
        with _Filled(table) as filled:
            _compiled().tabulate(slots, quota, num_experts, num_gpus, filled)
    else:
        table.copy_(_reference("routing").fill_table(slots, quota, num_experts, num_gpus, width))


def transfer(
    backend: str,
    ahead: Tensor,
    live: Tensor,
    num_experts: int,
    num_gpus: int,
    gpus_per_node: int,
    out: Sequence[Tensor],
) -> None:
    """Fill `out`: source [L, P], batch [L, P] and counts [L, 5].

    Raises:
        ValueError: a slot names no expert and is not -1.
    """
    after, before = _on_cpu(ahead), _on_cpu(live)
    for name, slots in (("ahead", after), ("live", before)):
        _check_held(name, slots, num_experts)
    sizes = num_experts, num_gpus, gpus_per_node
    if backend == "cpu":
        with ExitStack() as stack:
            _compiled().transfer(after, before, *sizes, [stack.enter_context(_Filled(tensor)) for tensor in out])
        return
    stage = _reference("transfers")
    source = stage.choose_sources(after, before, *sizes)
    batch = stage.batch_transfers(source, num_gpus)
    counts = stage.count_transfers(source, batch, num_gpus, gpus_per_node)
    for target, made in zip(out, (source, batch, counts), strict=True):
        target.copy_(made)


class _Filled:
    """The tensor itself where it is on the CPU, else one there that is copied back."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._filled = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")

    def __enter__(self) -> Tensor:
        return self._filled

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._filled is not self._target:
            self._target.copy_(self._filled)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _compiled() -> Any:
    return import_module("eplb_triton.cpu.serve")


def _reference(stage: str) -> Any:
    return import_module(f"eplb_reference.{stage}")


def _check_held(name: str, slots: Tensor, num_experts: int) -> None:
    """Refuse a slot map that names what is no expert and not -1."""
    if slots.numel() and not (int(slots.min()) >= -1 and int(slots.max()) < num_experts):
        layer, slot = ((slots < -1) | (slots >= num_experts)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{layer}, {slot}]={int(slots[layer, slot])} must be -1 to {num_experts - 1}; "
            "it is the first that is not"
        )


def _check_placed(counts: Tensor, phy2log: Tensor) -> None:
    """Refuse tokens of an expert that no slot holds."""
    held = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.bool, device="cpu")
    held.scatter_(1, phy2log.long() + 1, True)
    lost = (counts > 0) & ~held[:, 1:]
    if bool(lost.any()):
        layer, expert = lost.nonzero()[0].tolist()
        raise ValueError(
            f"counts[{layer}, {expert}]={counts[layer, expert].item()} must be 0, "
            f"for no slot of phy2log[{layer}] holds expert {expert}; place it first"
        )
