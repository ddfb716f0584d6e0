"""From tensors to the compiled entry points of splitting, routing and transfers: layers spread over threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from eplb_triton.cpu.arith import ints
from eplb_triton.cpu.compiled import entry_point
from eplb_triton.cpu.launcher import _in_spans
from eplb_triton.cpu.places import Int32s, Slots
from eplb_triton.cpu.routing import exact_slots, fill_table, hashed_slots
from eplb_triton.cpu.splitting import place_classes, split_counts, whole_counts
from eplb_triton.cpu.transfers import batch_transfers, choose_sources, count_transfers

SLOTS_PER_THREAD = 4096  # about 0.3 ms of rounds; a thread costs 0.05 to 0.2 ms


def classify(phy2log: torch.Tensor, num_gpus: int, out: torch.Tensor) -> None:
    """Fill `out` [L, E] int32 with the classes of `phy2log` [L, P] int32 or int64; both contiguous."""
    _compiled_classes(_name(phy2log))(phy2log.numpy(), num_gpus, out.numpy())


def split(
    phy2log: torch.Tensor, classes: torch.Tensor, counts: torch.Tensor, num_gpus: int, rounds: int, out: torch.Tensor
) -> None:
    """Fill `out` [L, P] int32 with quotas; all tensors contiguous and on the CPU.

    Args:
        phy2log: [L, P] int32 or int64.
        classes: [L, E] int32.
        counts: [L, E] int64, or float32 loads.
        num_gpus: D.
        rounds: most rounds.
        out: filled.
    """
    layers, slots = phy2log.shape
    arrays = phy2log.numpy(), classes.numpy(), counts.numpy()
    split_layers = _compiled_split(_name(phy2log), _name(counts))

    def work(first: int, last: int) -> None:
        split_layers(*arrays, num_gpus, rounds, out.numpy(), first, last)

    _in_spans(work, layers, max(1, min(torch.get_num_threads(), layers, layers * slots // SLOTS_PER_THREAD)))


def route(
    topk_ids: torch.Tensor,
    phy2log: torch.Tensor,
    quotas: torch.Tensor,
    offsets: torch.Tensor | None,
    num_experts: int,
    num_gpus: int,
    layer: int,
    salt: int,
    out: torch.Tensor,
) -> None:
    """Fill `out` [tokens, k], of the type of `topk_ids`: by counting where `offsets` [E] is given, else by a hash.
    `phy2log` and `quotas` [P] are those of the layer; all tensors contiguous and on the CPU."""
    if offsets is None:
        hashed = _compiled_hashed(_name(topk_ids), _name(phy2log))
        numbers = num_experts, num_gpus, layer, salt & 0xFFFFFFFF
        hashed(topk_ids.numpy(), phy2log.numpy(), quotas.numpy(), *numbers, out.numpy())
    else:
        exact = _compiled_exact(_name(topk_ids), _name(phy2log))
        exact(topk_ids.numpy(), phy2log.numpy(), quotas.numpy(), offsets.numpy(), num_gpus, out.numpy())


def tabulate(phy2log: torch.Tensor, quotas: torch.Tensor, num_experts: int, num_gpus: int, out: torch.Tensor) -> None:
    """Fill `out` [L, E, M], of the type of `phy2log` [L, P], from `quotas` [L, P] int32; all contiguous."""
    _compiled_table(_name(phy2log))(phy2log.numpy(), quotas.numpy(), num_experts, num_gpus, out.numpy())


def transfer(
    ahead: torch.Tensor,
    live: torch.Tensor,
    num_experts: int,
    num_gpus: int,
    gpus_per_node: int,
    out: Sequence[torch.Tensor],
) -> None:
    """Fill `out`, source [L, P], batch [L, P] and counts [L, 5], int32, from `ahead` and `live` [L, P] of one type; all
    contiguous."""
    arrays = [tensor.numpy() for tensor in out]
    numbers = num_experts, num_gpus, gpus_per_node
    _compiled_transfers(_name(ahead))(ahead.numpy(), live.numpy(), *numbers, *arrays)


def compile_all() -> None:
    """Compile all of the above, for int64 maps, ids and counts: what a placement on the CPU asks for by default."""
    _compiled_classes("int64")
    _compiled_split("int64", "int64")
    _compiled_exact("int64", "int64")
    _compiled_hashed("int64", "int64")
    _compiled_table("int64")
    _compiled_transfers("int64")


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@cache
def _compiled_classes(slots: str) -> Callable[..., None]:
    def class_layers(phy2log: Slots, num_gpus: int, classes: Int32s) -> None:
        for layer in range(phy2log.shape[0]):
            place_classes(phy2log[layer], num_gpus, classes[layer])

    return entry_point(
        class_layers, f"void({slots}[:, ::1], int64, int32[:, ::1])", slots, "classes of experts, about 1 s"
    )


@cache
def _compiled_split(slots: str, counts_type: str) -> Callable[..., None]:
    floating = counts_type == "float32"

    def split_layers(
        phy2log: Slots,
        classes: Int32s,
        counts: Any,  # [L, E] int64 or float32
        num_gpus: int,
        rounds: int,
        quotas: Int32s,
        first: int,
        last: int,
    ) -> None:
        whole = ints(counts.shape[1])
        for layer in range(first, last):
            if floating:
                whole_counts(counts[layer], whole)
            else:
                whole[:] = counts[layer]
            split_counts(phy2log[layer], classes[layer], whole, num_gpus, rounds, quotas[layer])

    arrays = f"{slots}[:, ::1], int32[:, ::1], {counts_type}[:, ::1]"
    signature = f"void({arrays}, int64, int64, int32[:, ::1], int64, int64)"
    return entry_point(split_layers, signature, f"{slots}-{counts_type}", "splitting, about 2 s")


@cache
def _compiled_exact(ids: str, slots: str) -> Callable[..., None]:
    def exact(topk_ids: Slots, phy2log: Slots, quotas: Int32s, offsets: Int32s, num_gpus: int, out: Slots) -> None:
        exact_slots(topk_ids, phy2log, quotas, offsets, num_gpus, out)

    signature = f"void({ids}[:, ::1], {slots}[::1], int32[::1], int32[::1], int64, {ids}[:, ::1])"
    return entry_point(exact, signature, f"{ids}-{slots}", "slots of tokens, about 1 s")


@cache
def _compiled_hashed(ids: str, slots: str) -> Callable[..., None]:
    def hashed(
        topk_ids: Slots,
        phy2log: Slots,
        quotas: Int32s,
        num_experts: int,
        num_gpus: int,
        layer: int,
        salt: int,
        out: Slots,
    ) -> None:
        hashed_slots(topk_ids, phy2log, quotas, num_experts, num_gpus, layer, salt, out)

    signature = f"void({ids}[:, ::1], {slots}[::1], int32[::1], int64, int64, int64, int64, {ids}[:, ::1])"
    return entry_point(hashed, signature, f"{ids}-{slots}", "slots of tokens by hash, about 1 s")


@cache
def _compiled_table(slots: str) -> Callable[..., None]:
    def fill_tables(phy2log: Slots, quotas: Int32s, num_experts: int, num_gpus: int, table: Any) -> None:
        for layer in range(phy2log.shape[0]):
            fill_table(phy2log[layer], quotas[layer], num_experts, num_gpus, table.shape[2], table[layer])

    signature = f"void({slots}[:, ::1], int32[:, ::1], int64, int64, {slots}[:, :, ::1])"
    return entry_point(fill_tables, signature, slots, "tables of slots, about 1 s")


@cache
def _compiled_transfers(slots: str) -> Callable[..., None]:
    def transfer_layers(
        ahead: Slots,
        live: Slots,
        num_experts: int,
        num_gpus: int,
        gpus_per_node: int,
        source: Int32s,
        batch: Int32s,
        counts: Int32s,
    ) -> None:
        for layer in range(ahead.shape[0]):
            choose_sources(ahead[layer], live[layer], num_experts, num_gpus, gpus_per_node, source[layer])
            batch_transfers(source[layer], num_gpus, batch[layer])
            count_transfers(source[layer], batch[layer], num_gpus, gpus_per_node, counts[layer])

    out = ", ".join(["int32[:, ::1]"] * 3)
    signature = f"void({slots}[:, ::1], {slots}[:, ::1], int64, int64, int64, {out})"
    return entry_point(transfer_layers, signature, slots, "transfers, about 1 s")
