"""Checks of what users pass in."""

import math

import numpy as np
import pytest
import torch

from flowpost._checks import as_tensor, check_positive_int
from flowpost._events import chosen


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 2.5, math.nan, math.inf, -1, 0, "3", "three", [1, 2], 1j),
        *(np.array([1, 2]), torch.tensor([1, 2]), torch.tensor(2.5), torch.ones(0), object),
    ],
)
def test_what_is_no_positive_whole_number(value):
    with pytest.raises(ValueError, match="Expected n as a whole number of at least 1; got"):
        check_positive_int(value, "n")


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind(value):
    found = check_positive_int(value, "n", minimum=3)
    assert type(found) is int
    assert found == 3
    with pytest.raises(ValueError, match="Expected n as a whole number of at least 4; got"):
        check_positive_int(value, "n", minimum=4)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("labels", {"e": [1.0]}, r"got dict\. Pack it, as a Product does: space\.pack\(\{…\}\)\.$"),
        ("x", {"a": [1.0]}, r"got dict\. Stack its values into one tensor\.$"),
        ("labels", object(), r"got object\. Convert it with torch\.as_tensor first \("),
    ],
)
def test_what_is_no_tensor(name, value, text):
    with pytest.raises(
        ValueError, match=f"Expected {name} as a tensor or array of numbers; {text}"
    ):
        as_tensor(value, name)


def test_rows_of_events_and_their_device():
    x = {"a": np.arange(4.0), "b": (torch.arange(8).reshape(4, 2), None)}
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True, False])):
        found = chosen(x, rows, torch.device("meta"))
        assert found["a"].device == found["b"][0].device == torch.device("meta")
        assert chosen(x, rows)["b"][0].shape == found["b"][0].shape == (2, 2)
    assert chosen(x, torch.tensor([2, 0]))["a"].tolist() == [2.0, 0.0]
    assert chosen(x, torch.tensor([2, 0]))["b"][1] is None
