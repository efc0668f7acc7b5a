"""Final answers: numbers are compared by value, everything else as it is written."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from understudy import metrics
from understudy.metrics.final_answer import agree, is_correct, marked_answer, parse_final_answer

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


def value_of(name, responses, references):
    """One metric's value."""
    return metrics.score([name], responses, references)[name].value


def shared(path):
    """A file of the data beside the repository."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"there is no {path} beside the repository")
    return file


EQUAL = [
    ("18.00", "18"),
    ("1,000", "1000"),
    ("\u22125", "-5"),
    ("\u20135", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    (".5", "0.5"),
    ("-.5", "-1/2"),
    ("+5", "5"),
    ("1/2", "0.5"),
    ("1 1/2", "1.5"),
    ("1e5", "100,000"),
    ("5 million", "5000000"),
    ("50 %", "50"),
    ("5 km", "5"),
    ("5cm", "5"),
    ("$18", "18 dollars"),
    ("18 eggs per day", "18 eggs"),
    ("(3, 4)", "(3,4)"),
    ("3:05", "3:5"),
    ("x = 5", "x=5"),
    ("Rome, Italy.", "rome italy"),
    ("It's", "its"),
    ("seven", "Seven"),
    ("1" * 5000, "1" * 5000),
]
DIFFERENT = [
    ("1/3", "1/2"),
    ("3:45", "3:15"),
    ("3:45", "4:45"),
    ("1.5", "15"),
    ("1,5", "15"),
    ("-5", "5"),
    ("12x", "12"),
    ("x-1", "x+1"),
    ("3^2", "32"),
    ("3 pm", "3 am"),
    ("5 million", "5"),
    ("3 and 4", "3 and 5"),
    ("2024-01-05", "2024-01-06"),
    ("two words", "twowords"),
    ("!!!", "???"),
    ("9**9**9", "9"),
    ("1" * 5000, "1" * 4999),
]


@pytest.mark.parametrize("form", ["{}", "so it is\n#### {}", "\\boxed{{{}}}"])
def test_answers_agree_if_their_numbers_do_and_everything_else_is_written_alike(form):
    for pairs, expected in ((EQUAL, True), (DIFFERENT, False)):
        for first, second in pairs:
            texts = form.format(first), form.format(second)
            assert agree(*texts) is agree(*texts[::-1]) is expected, (first[:20], second[:20])


def test_the_reference_decides_whether_only_the_final_answer_counts():
    assert agree("3 + 4 = 7\n#### 7", "#### 7.0")
    assert agree("so \\boxed{7}", "#### 7")
    assert not agree("7", "#### 7")
    assert agree("7", "7")
    assert not agree("3 + 4 = 7\n#### 7", "7")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7\n#### 7", "7"),
        ("#### 1,234,567", "1,234,567"),
        ("#### $5.50", "$5.50"),
        ("####12", "12"),
        ("#### 1\n#### 2", "2"),
        ("####\n7\nand more", "7"),
        ("#### 7. The answer is 7", "7"),
        ("#### 7 (since 3 + 4 = 7)", "7"),
        ("the answer is 7", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_the_marked_answer_is_the_line_behind_the_last_mark(text, answer):
    assert marked_answer(text) == answer


def test_a_response_is_correct_if_it_ends_in_the_final_answer_of_a_reference():
    assert is_correct("guessing\n#### 1,000", ["2+2 #### 5", "#### 1000"])
    assert not is_correct("#### 7", ["#### 70"])
    assert not is_correct("7", ["#### 7"])
    assert not is_correct("7", ["7"]), "two responses without a mark are not equal"


def test_long_and_odd_texts_take_no_longer_than_their_length():
    for text in (
        "\\boxed{" * 5000,
        "#### " * 5000,
        "1,111" * 5000,
        "-" * 9999,
        "1/" * 9999,
        "\\frac{" * 5000,
        "$" * 9999,
    ):
        assert not agree(text, "#### 1")
        parse_final_answer(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she has 18 dollars", 18),
        ("#### 1,234,567 apples", 1234567),
        ("it is 3.\n#### -3", -3),
        ("#### $5.50", Fraction(11, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("\u22127", -7),
        ("16 - 3 = 13", 13),
        ("10-3", 3),
        ("rows 3 and 1,2", 2),
        ("half, .5", Fraction(1, 2)),
        ("1/2 cup", Fraction(1, 2)),
        ("50%", 50),
        ("in 3.", 3),
        (r"\boxed{18}, of 20", 18),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{5\text{ cm}}", 5),
        (r"\boxed{\$1,200.00}", 1200),
        (r"\boxed{12\%}", 12),
        (r"\boxed{18", 18),
        (r"\boxed{1} or rather #### 2", 2),
        (r"#### 2 or rather \boxed{x^{2} + 1}", "x^{2}+1"),
        (r"\boxed{12x}", "12x"),
        (r"\boxed{10-3}", "10-3"),
        ("it is 03:45", "3:45"),
        ("#### 3:45", "3:45"),
        ("#### seven", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_mark_or_box_and_without_either_the_last_number(text, number):
    assert parse_final_answer(text) == number


def test_final_answers_are_compared_as_numbers():
    references = [["It is\n#### 1,000"]] * 5 + [["a", "#### 3"], ["no number"]]
    responses = ["1000", "$1,000.00", r"\boxed{1000\text{ km}}", "#### 1001", "1000 of 2000", "3", "none"]
    assert value_of("final_answer", responses, references) == pytest.approx(100 * 4 / 7)


def test_every_reference_of_gsm8k_has_its_final_answer_parsed_in_several_forms():
    rows = [json.loads(line) for line in shared("data/gsm8k/test.jsonl").read_text().splitlines()]
    assert len(rows) == 1319
    references = [[row["answer"]] for row in rows]
    parts = [row["answer"].rpartition("####") for row in rows]
    for row, (_, _, number) in zip(rows, parts, strict=True):
        assert parse_final_answer(row["answer"]) == Fraction(number.strip().replace(",", ""))
    for form in ("{}#### {}", "{}The answer is ${}.", "{}\\boxed{{{}}}", "{}That makes {} dollars."):
        responses = [form.format(work, number.strip()) for work, _, number in parts]
        assert value_of("final_answer", responses, references) == 100


@pytest.mark.parametrize(
    ("answer", "other", "same"),
    [
        ("5 km", "5 miles", False),
        ("5 km", "5", True),
        ("A", "A", True),
        ("(A)", "A", True),
        ("A", "B", False),
        ("A", "The", False),
        ("-x", "x", False),
        (r"2\pi", "2", False),
        (r"2\pi", r"2 \pi", True),
        ("!!", "??", False),
    ],
)
def test_the_metric_compares_marked_answers_as_accuracy_does(answer, other, same):
    marked, other_marked = f"#### {answer}", rf"so \boxed{{{other}}}"
    assert value_of("final_answer", [marked], [[other_marked]]) == 100.0 * same
    assert is_correct(marked, [other_marked]) == same
