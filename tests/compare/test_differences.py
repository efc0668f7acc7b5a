"""The difference of two variants: its interval holds its level for few seeds, and finds what is certain."""

import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from understudy.compare.differences import LEAST_PROMPTS, paired_difference
from understudy.compare.statistics import Result, difference_notes, table_rows
from understudy.compare.student_t import p_value, quantile
from understudy.compare.table import markdown


def answers(draw, seeds, prompts=1000, deviation=0.019, better=0.0):
    """(2, S, A) answers of a variant that is `better` by so much and a baseline, half of them right.

    `deviation` is that of a run's accuracy over training seeds; `benchmarks/null_differences.py` has more of this.
    """
    difficulty = draw.beta(0.75, 0.75, prompts)
    training = draw.normal(0, deviation, (2, seeds, 1)) + np.array([better, 0.0])[:, None, None]
    return (draw.random((2, seeds, prompts)) < difficulty + training).astype(float)


def rejections(seeds, count, **options):
    """The share of comparisons with p < 0.05, which are those whose interval leaves 0 out."""
    draw = np.random.default_rng(seeds)
    differences = [paired_difference(*answers(draw, seeds, **options)) for _ in range(count)]
    assert all((d.p < 0.05) == (not d.low <= 0 <= d.high) for d in differences)
    return np.mean([d.p < 0.05 for d in differences])


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 7, 10])
def test_variants_that_are_equal_differ_significantly_in_a_twentieth_of_comparisons_at_most(seeds):
    """At a seed deviation of 1.9 points, as on the playground. Three standard errors above 5 % are allowed."""
    assert rejections(seeds, 300) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_without_any_chance_in_training_or_with_few_prompts_the_level_holds_as_well():
    for options in ({"deviation": 0.0}, {"prompts": LEAST_PROMPTS}):
        assert rejections(3, 300, **options) <= 0.05


def test_a_difference_that_is_much_larger_than_the_seeds_deviation_is_found():
    assert rejections(5, 100, better=0.1) > 0.95
    assert rejections(3, 100, better=0.2) > 0.9


def test_with_one_seed_the_interval_is_over_prompts_and_there_is_no_p_value():
    """200 prompts of which ten differ: mean 0.05, standard error √(0.05 · 0.95/199)."""
    baseline = np.arange(200) % 2
    scores = baseline.copy()
    scores[np.flatnonzero(baseline == 0)[:10]] = 1
    difference = paired_difference([scores], [baseline])
    half = quantile(0.05, 199) * (0.05 * 0.95 / 199) ** 0.5
    assert (difference.p, difference.seeds) == (None, 1)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.05, 0.05 - half, 0.05 + half))
    reverse = paired_difference([baseline], [scores])
    assert (reverse.mean, reverse.low, reverse.high) == (-difference.mean, -difference.high, -difference.low)


def test_where_prompts_make_no_difference_it_is_the_paired_t_test_of_the_seeds():
    """Five seeds whose means differ by 1 … 5: t = 3/√(2.5/5) = 4.243, p = 0.0132 with four degrees of freedom."""
    difference = paired_difference(np.repeat(np.arange(1.0, 6.0)[:, None], 50, axis=1), np.zeros((5, 50)))
    assert difference.p == pytest.approx(0.01324, abs=1e-5)
    assert difference.high - difference.mean == pytest.approx(2.776 * 0.5**0.5, abs=1e-3)


def test_variants_with_the_same_answers_do_not_differ():
    same = paired_difference([[1.0, 0.0] * 20] * 2, [[1.0, 0.0] * 20] * 2)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert same.p == pytest.approx(1)


def test_too_few_prompts_have_no_p_value():
    assert paired_difference(np.ones((3, LEAST_PROMPTS - 1)), np.zeros((3, LEAST_PROMPTS - 1))).p is None
    assert paired_difference([[1.0]], [[0.0]]).p is None


def test_a_hundred_thousand_prompts_and_ten_seeds_take_little_memory():
    draw = np.random.default_rng(0)
    scores, baseline = answers(draw, 10, prompts=100_000)
    tracemalloc.start()
    paired_difference(scores, baseline)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("alpha", "freedom", "expected"),
    [
        (0.05, 1, 12.7062),
        (0.05, 2, 4.3027),
        (0.01, 3, 5.8409),
        (0.05, 9, 2.2622),
        (0.01, 29, 2.7564),
        (0.01, 30, 2.7500),
        (0.001, 60, 3.4602),
        (0.05, 10**6, NormalDist().inv_cdf(0.975)),
    ],
)
def test_the_quantiles_are_those_of_the_tables(alpha, freedom, expected):
    assert quantile(alpha, freedom) == pytest.approx(expected, abs=1e-4)
    assert p_value(lambda level: expected > quantile(level, freedom)) == pytest.approx(alpha, rel=1e-3)


def results(*scores):
    return {
        s: Result({"greedy": {"accuracy": sum(a) / len(a)}}, {"greedy": {"accuracy": a}}) for s, a in enumerate(scores)
    }


def test_the_table_says_what_the_interval_is_over():
    right, wrong = [1.0, 0.0, 1.0, 1.0] * 5, [0.0, 1.0, 0.0, 1.0] * 5
    columns = [("greedy", "accuracy")]
    one = table_rows({"kd": results(wrong), "gkd": results(right)}, baseline="kd")
    assert "+25.0 (-14.8 to +64.8 over prompts)" in markdown(one, columns, {})
    [note] = difference_notes(one)
    assert "With one seed, the interval of a difference is over prompts alone" in note
    assert note in markdown(one, columns, {})
    two = table_rows({"kd": results(wrong, right), "gkd": results(right, right)}, baseline="kd")
    assert difference_notes(two) == []
    assert " (p " in markdown(two, columns, {})


def test_scores_of_other_prompts_are_not_compared():
    table = table_rows({"kd": results([1.0, 0.0]), "gkd": results([1.0, 0.0, 1.0])}, baseline="kd")
    assert table[1].difference == {}
