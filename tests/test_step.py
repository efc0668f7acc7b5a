"""Random numbers keyed by seed, step and names."""

import subprocess
import sys

import pytest
import torch

from understudy.step import Step


def test_a_number_does_not_depend_on_those_drawn_before():
    first = Step(3, seed=1).uniform("coin")
    torch.rand(5)
    Step(3, seed=1).stream(7, "other")
    assert Step(3, seed=1).uniform("coin") == first


def test_a_number_is_the_same_in_another_process():
    """Python salts `hash` in every process; a random number must not depend on it."""
    code = (
        "from understudy.step import Step; s = Step(3, 1); print(repr((s.uniform('a', 1), s.stream(2, 'b').tolist())))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == repr((Step(3, 1).uniform("a", 1), Step(3, 1).stream(2, "b").tolist()))


@pytest.mark.parametrize("other", [Step(4, seed=1), Step(3, seed=2)])
def test_another_step_or_seed_gives_another_number(other):
    assert other.uniform("coin") != Step(3, seed=1).uniform("coin")
    assert not torch.equal(other.stream(4, "row", 0), Step(3, seed=1).stream(4, "row", 0))


def test_names_differ_by_type_and_by_where_they_end():
    step = Step(0)
    assert (
        len({step.uniform("a", "bc"), step.uniform("ab", "c"), step.uniform("abc"), step.uniform(1), step.uniform("1")})
        == 5
    )


def test_the_number_of_steps_in_a_run_changes_no_number():
    assert Step(3, 1, total=10).uniform("coin") == Step(3, 1, total=20).uniform("coin")


def test_a_longer_stream_begins_with_the_shorter_one():
    assert torch.equal(Step(0).stream(8, "row", 1)[:3], Step(0).stream(3, "row", 1))


def test_numbers_are_uniform_over_steps():
    draws = torch.tensor([Step(number).uniform("coin") for number in range(4000)], dtype=torch.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert (
        float(((counts - 200) ** 2 / 200).sum()) < 43.8
    )  # the 0.999 quantile of chi-square with 19 degrees of freedom


def test_streams_of_neighbouring_rows_and_steps_are_uncorrelated():
    rows = torch.stack([Step(number).stream(200, "student", row, 0) for number in range(4) for row in range(8)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.3  # 496 pairs of 200 draws: five standard deviations are 0.35
