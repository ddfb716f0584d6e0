"""The arithmetic the results depend on, against plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_reference.arith import bottom_two, ordered_mean, ordered_sum, per_replica, square_root, top_two

loads = st.floats(0, 2.0**100, width=32)


@given(st.lists(loads, min_size=1, max_size=80))
def test_sums_run_left_to_right_in_float64(values: list[float]) -> None:
    total = 0.0
    for value in values:
        total += value
    assert ordered_sum(torch.tensor([values])).item() == total
    assert ordered_mean(torch.tensor([values])).item() == total / len(values)


def test_long_sums_run_left_to_right() -> None:
    """Long enough for any blocked or vectorised summation to show."""
    values = np.random.default_rng(0).lognormal(0, 8, (3, 4096))
    expected = []
    for row in values:
        total = 0.0
        for value in row.tolist():
            total += value
        expected.append(total)
    assert ordered_sum(torch.from_numpy(values)).tolist() == expected
    assert [math.fsum(row) for row in values] != expected  # the order shows in these values


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9))
def test_two_largest_and_smallest_take_the_lowest_index(values: list[int]) -> None:
    row = torch.tensor([values], dtype=torch.float32)
    ascending = sorted(range(len(values)), key=lambda i: (values[i], i))
    descending = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert top_two(row)[0].tolist() == descending[:2]
    assert bottom_two(row)[0].tolist() == ascending[:2]


@given(loads, st.integers(1, 4096))
def test_quotients_are_correctly_rounded(load: float, count: int) -> None:
    got = per_replica(torch.tensor([[load]]), torch.tensor([[count]])).item()
    exact = Fraction(load) / count
    below, above = (float(np.nextafter(np.float32(got), np.float32(x))) for x in (-np.inf, np.inf))
    error = abs(Fraction(got) - exact)
    assert error <= abs(Fraction(below) - exact)
    assert error <= abs(Fraction(above) - exact)


@pytest.mark.parametrize("smallest", [2.0**-149, 2.0**-130])
def test_subnormals_are_kept(smallest: float) -> None:
    assert per_replica(torch.tensor([[3 * smallest]]), torch.tensor([[3]])).item() == smallest


def test_square_roots_are_correctly_rounded() -> None:
    """The first four are among those of which Intel's vector library, behind PyTorch's operator, is 1 bit off."""
    values = [0.1940274549007932, 0.8520523324627752, 0.09477667836116699, 11321.988583128052, 0.0, 2.0, 2.0**-1022]
    values += np.random.default_rng(0).lognormal(0, 8, 1000).tolist()
    assert square_root(torch.tensor(values, dtype=torch.float64)).tolist() == [math.sqrt(value) for value in values]
