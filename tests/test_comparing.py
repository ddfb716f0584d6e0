"""What a failed comparison says."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.comparing import assert_same, assert_same_maps

PHY2LOG = torch.arange(24).view(2, 12)


def test_equal_is_silent() -> None:
    assert_same(PHY2LOG.clone(), PHY2LOG, "phy2log")
    assert_same(PHY2LOG.numpy(), PHY2LOG, "phy2log")
    assert_same([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), "pairs")
    assert_same(torch.zeros(0, 12), torch.zeros(0, 12), "no layers")
    assert_same_maps((PHY2LOG, PHY2LOG, PHY2LOG[:1]), [PHY2LOG, PHY2LOG, PHY2LOG[:1]])


def test_the_first_difference_is_named() -> None:
    got = PHY2LOG.clone()
    got[1, 3:5] = 7
    said = "phy2log[layer 1, slot 3] is 7, must be 15; 2 of 24 values differ, in 1 of 2 rows"
    with pytest.raises(AssertionError, match=f"^{re.escape(said)}$"):
        assert_same(got, PHY2LOG, "phy2log")
    with pytest.raises(AssertionError, match=re.escape("phyrank of ties[layer 1, slot 3] is 7")):
        assert_same_maps((PHY2LOG, got, PHY2LOG), (PHY2LOG, PHY2LOG, PHY2LOG), "ties")
    with pytest.raises(AssertionError, match=re.escape("order[1, 3] is 7, must be 15")):
        assert_same(got, PHY2LOG, "order")
    with pytest.raises(AssertionError, match=re.escape("scale[0] is 1, must be 2; 1 of 1 values differ")):
        assert_same(torch.tensor(1), torch.tensor(2), "scale")


def test_shape_and_type_are_part_of_it() -> None:
    with pytest.raises(AssertionError, match=re.escape("logcnt has shape (2, 11), must be (2, 12)")):
        assert_same(PHY2LOG[:, 1:], PHY2LOG, "logcnt")
    with pytest.raises(AssertionError, match=re.escape("logcnt has dtype torch.int32, must be torch.int64")):
        assert_same(PHY2LOG.int(), PHY2LOG, "logcnt")


def test_a_value_that_is_no_number_equals_nothing() -> None:
    with pytest.raises(AssertionError, match=re.escape("loads[1] is nan, must be nan")):
        assert_same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), "loads")
