"""The gate of loads: what passes comes out usable, what does not is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eplb_triton import Topology, lower_bound
from eplb_triton.checks import check_map
from eplb_triton.loads import LOAD_DTYPES, as_loads, bad_load, check_shape

ONES = torch.ones(2, 3)
GATES: dict[str, Callable[[Any], object]] = {
    "as_loads": as_loads,
    "check_shape": check_shape,
    "lower_bound": lambda loads: lower_bound(loads, Topology(num_replicas=6, num_gpus=3)),
}


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls nested tensors a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(ONES, 1.0, 0, torch.quint8)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(3), r"weight has shape \(3,\), must be 2-D: \[layers, experts\]"),
        (lambda: torch.ones(1, 2, 3), r"weight has shape \(1, 2, 3\), must be 2-D"),
        (ONES.bool, r"weight has dtype torch.bool, must be real or integer; weight.float\(\) makes it so"),
        (lambda: ONES.to(torch.complex64), "weight has dtype torch.complex64, must be real or integer"),
        (ONES.to_sparse, r"weight has layout torch.sparse_coo, must be dense \[layers, experts\]"),
        (ONES.to_sparse_csr, r"weight has layout torch.sparse_csr, must be dense .* weight.to_dense\(\)"),
        (lambda: ONES.to("meta"), "weight is on the meta device, which holds no values"),
        (quantized, r"weight has the quantized dtype torch.quint8, must be .* weight.dequantize\(\)"),
        (nested, "weight is a nested tensor, must be dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_refused_by_kind(gate: str, make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GATES[gate](make())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [None, [[1.0, 2.0]], np.ones((2, 3))])
def test_refused_by_type(gate: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"weight is a {type(value).__name__}, must be a torch.Tensor"):
        GATES[gate](value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0, -1e-44, 2.0**100 * 1.0001])
def test_refused_by_value(value: float, dtype: torch.dtype) -> None:
    loads = torch.ones(2, 3, dtype=torch.float64)
    loads[1, 0] = loads[1, 2] = value
    with pytest.raises(ValueError, match=r"weight\[1, 0\]=\S+ must be a finite load .* at most 2\*\*100"):
        as_loads(loads, dtype=dtype)
    with pytest.raises(ValueError, match=r"loads\[0, 1, 0\]=\S+ must be a finite load of at least 0"):
        as_loads(loads[None], name="loads", history=True, dtype=dtype)


@pytest.mark.parametrize("pairing", [True, False])
@pytest.mark.parametrize("value", [torch.nan, -1.0, torch.inf])
def test_a_bound_of_bad_loads_is_refused(value: float, pairing: bool) -> None:
    """With pairs to solve, the search for the bound of a NaN never ended; without, the plan counted as perfect."""
    loads = torch.ones(2, 6)
    loads[1, 4] = value
    with pytest.raises(ValueError, match=r"weight\[1, 4\]=\S+ must be a finite load"):
        lower_bound(loads, Topology(num_replicas=8, num_gpus=4), pairing=pairing)


def test_a_history_needs_steps() -> None:
    assert as_loads(torch.ones(3, 2, 4), history=True).shape == (3, 2, 4)
    with pytest.raises(ValueError, match=r"loads has 0 steps, must have at least 1: it is \[steps, layers, experts\]"):
        as_loads(torch.ones(0, 2, 4), name="loads", history=True)
    with pytest.raises(ValueError, match=r"loads has shape \(2, 4\), must be 3-D: \[steps, layers, experts\]"):
        as_loads(torch.ones(2, 4), name="loads", history=True)


def test_what_is_traced_has_no_values() -> None:
    check_shape(ONES.to("meta"), values=False)


@pytest.mark.parametrize("dtype", sorted(LOAD_DTYPES, key=str), ids=str)
def test_every_dtype_of_numbers(dtype: torch.dtype) -> None:
    loads = torch.tensor([[0, 1, 2], [4, 8, 16]], dtype=torch.int64).to(dtype)
    for want in (torch.float32, torch.float64):
        got = as_loads(loads, dtype=want)
        assert got.dtype == want
        assert got.tolist() == [[0, 1, 2], [4, 8, 16]]


def test_what_comes_out_is_contiguous_positive_and_its_own() -> None:
    loads = torch.tensor([[-0.0, 1.0, 2.0], [3.0, -0.0, 5.0]]).T
    for dtype in (torch.float32, torch.float64):
        got = as_loads(loads, dtype=dtype)
        assert got.is_contiguous()
        assert not got.signbit().any()
        got.fill_(7)
        assert loads.max() == 5
    assert as_loads(torch.complex(ONES, -ONES).conj().imag).equal(ONES)  # a tensor that is only marked as negated
    assert as_loads(ONES.clone().requires_grad_()).requires_grad is False


def test_loads_are_judged_after_rounding_to_float32() -> None:
    loads = torch.tensor([[2.0**100 * (1 + 2**-40), -1e-60, 1.5]], dtype=torch.float64)
    assert as_loads(loads).tolist() == [[2.0**100, 0.0, 1.5]]
    assert as_loads(loads, dtype=torch.float64).tolist() == [[2.0**100 * (1 + 2**-40), 0.0, 1.5]]


@given(st.lists(st.floats(0, 2.0**99), min_size=1, max_size=8))
def test_each_load_is_rounded_once_to_the_nearest(values: list[float]) -> None:
    loads = torch.tensor([values], dtype=torch.float64)
    assert as_loads(loads).numpy().tolist() == [np.array(values, np.float32).tolist()]
    assert as_loads(loads, dtype=torch.float64).tolist() == [[value + 0.0 for value in values]]


def test_the_error_of_a_load_found_elsewhere() -> None:
    """A kernel says which load was bad; the text is the same."""
    assert str(bad_load(-ONES, (1, 2))).startswith("weight[1, 2]=-1.0 must be a finite load of at least 0")


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(2, 3), r"phy2log has dtype torch.float32, must be torch.int64 or torch.int32; phy2log.to\("),
        (torch.zeros(2, 3, dtype=torch.bool), "phy2log has dtype torch.bool, must be"),
        (torch.zeros(2, 3, dtype=torch.int16), "phy2log has dtype torch.int16, must be"),
        (torch.zeros(3, dtype=torch.int64), r"phy2log has shape \(3,\), must be 2-D: \[layers, replicas\]"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), "phy2log is on the meta device"),
        (torch.zeros(2, 3, dtype=torch.int64).to_sparse(), "phy2log has layout torch.sparse_coo"),
    ],
)
def test_refused_maps(slots: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_map("phy2log", slots, "[layers, replicas]")


def test_maps_that_pass() -> None:
    for dtype in (torch.int64, torch.int32):
        check_map("phy2log", torch.zeros(2, 3, dtype=dtype), "[layers, replicas]")
    check_map("phy2log", torch.zeros(2, 3, dtype=torch.uint8), "[layers, replicas]", dtypes=(torch.int64, torch.uint8))
    with pytest.raises(TypeError, match=r"log2phy is a list, must be a torch.Tensor \[layers, experts, ranks\]"):
        check_map("log2phy", [], "[layers, experts, ranks]")
