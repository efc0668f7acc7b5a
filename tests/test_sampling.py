"""Sampling parameters: values out of range are refused."""

from dataclasses import replace

import pytest

from understudy.sampling import Sampling


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_new_tokens": 0}, "sampling needs max_new_tokens >= 1, not 0"),
        ({"n": 0}, "sampling needs n >= 1, not 0"),
        ({"temperature": -1}, "sampling needs temperature >= 0, not -1"),
        ({"top_k": -1}, "sampling needs top_k >= 0, not -1"),
        ({"top_p": 0.0}, r"sampling needs top_p in \(0, 1\], not 0"),
        ({"top_p": 1.1}, r"sampling needs top_p in \(0, 1\], not 1.1"),
    ],
)
def test_a_value_out_of_range_is_refused(values, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Sampling(**values)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        replace(Sampling(), **values)


def test_stop_tokens_may_be_given_as_a_list():
    assert Sampling(stop_ids=[2, 7]) == Sampling(stop_ids=(2, 7))
    assert hash(Sampling(stop_ids=[2, 7])) == hash(Sampling(stop_ids=(2, 7)))
