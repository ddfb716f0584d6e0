"""Refusals of arguments that several doors share; each names the argument, what came, what is needed, and a way out."""

from __future__ import annotations

import torch
from torch import Tensor

MAP_DTYPES = (torch.int64, torch.int32)
"""What the maps of a plan are made of."""


def check_dense(name: str, value: object, words: str, *, values: bool = True) -> None:
    """Refuse what is not a plain dense tensor, without reading a value.

    Args:
        name: of the argument.
        value: anything.
        words: the shape to name, `[layers, experts]`.
        values: whether it must hold values; a tensor that is only traced holds none.

    Raises:
        TypeError: `value` is no tensor.
        ValueError: it is nested, sparse, quantized or, with `values`, on the meta device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a torch.Tensor {words}")
    if value.is_nested:
        raise ValueError(
            f"{name} is a nested tensor, must be dense {words}; torch.nested.to_padded_tensor({name}, 0) makes it so"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}, must be dense {words}; {name}.to_dense() makes it so")
    if value.is_quantized:
        raise ValueError(
            f"{name} has the quantized dtype {value.dtype}, must be plain {words}; {name}.dequantize() makes it so"
        )
    if values and value.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values; make it on a CPU or a GPU")


def check_map(name: str, slots: object, words: str, *, dtypes: tuple[torch.dtype, ...] = MAP_DTYPES) -> None:
    """Refuse a map (`phy2log`, `phyrank`, `logcnt`, `log2phy`) of another kind or type, without reading a value.

    Args:
        name: of the map.
        slots: anything.
        words: its shape in words, `[layers, replicas]`; as many dimensions are needed as it has names.
        dtypes: taken; a map of floats would be cut to integers without a word.

    Raises:
        TypeError: no tensor.
        ValueError: not dense, of another dtype or number of dimensions.
    """
    check_dense(name, slots, words)
    assert isinstance(slots, Tensor)
    if slots.dtype not in dtypes:
        raise ValueError(
            f"{name} has dtype {slots.dtype}, must be {' or '.join(map(str, dtypes))}; "
            f"{name}.to({dtypes[0]}) makes it so if it holds whole numbers"
        )
    if slots.dim() != words.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(slots.shape)}, must be {words.count(',') + 1}-D: {words}")
