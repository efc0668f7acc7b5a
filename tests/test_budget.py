"""Budgets: invalid ones are refused, and their text."""

import math

import pytest

from understudy.budget import Budget, amount, spent


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "of tokens or of seconds.*this has neither"),
        ({"tokens": 5, "seconds": 5.0}, "this has both"),
        ({"tokens": 0}, "a budget of 0 tokens cannot be spent: give more than 0"),
        ({"seconds": -1.0}, "a budget of -1 seconds cannot be spent"),
        ({"seconds": math.nan}, "cannot be spent"),
        ({"seconds": math.inf}, "cannot be spent"),
    ],
)
def test_an_invalid_budget_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Budget(**fields)


def test_budgets_as_text():
    assert amount({"tokens": 1_000_000}) == "1,000,000 response tokens"
    assert amount({"seconds": 90.5}) == "90.5 seconds of training"
    assert spent({"tokens": 1000, "spent": 1012}) == "1,012 of 1,000 response tokens"
    assert spent({"seconds": 60, "spent": 60.25}) == "60.2 of 60 seconds of training"
