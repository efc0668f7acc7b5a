"""What counts as a right answer."""

import pytest

from understudy.metrics.exact_match import exact_match, normalize
from understudy.metrics.final_answer import final_answer, is_correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3+4=7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### $5.50", "5.50"),
        ("#### -3", "-3"),
        ("####12", "12"),
        ("#### 1\n#### 2", "2"),
        ("the answer is 7", None),
        ("#### seven", None),
        ("", None),
        ("#### 7.", "7"),
    ],
)
def test_the_number_behind_the_last_mark_is_the_final_answer(text, number):
    assert final_answer(text) == number


def test_an_answer_is_correct_if_it_ends_in_the_final_answer_of_a_reference():
    assert is_correct("guessing\n#### 1,000", ["2+2 #### 5", "#### 1000"])
    assert not is_correct("#### 7", ["#### 70"])
    assert not is_correct("7", ["#### 7"])
    assert not is_correct("7", ["7"]), "two answers without a mark are not alike"


def test_an_exact_match_disregards_case_punctuation_and_white_space():
    assert exact_match("  Paris,\nFrance. ", ["Rome", "paris france"])
    assert not exact_match("Paris", ["Paris France"])
    assert not exact_match("anything", [])


def test_normalizing_twice_is_normalizing_once():
    text = "It's  A\ttest – really!"
    assert normalize(normalize(text)) == normalize(text)
