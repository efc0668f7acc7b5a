"""Statistics of results: spreads over seeds, share of the gap closed, the table."""

import numpy as np
import pytest

from understudy.compare.statistics import Result, Spread, budget_notes, table_rows
from understudy.compare.table import markdown


def result(accuracy, scores=(), **cost):
    return Result(
        {"greedy": {"accuracy": accuracy, "bleu": 10 * accuracy}}, {"greedy": {"accuracy": list(scores)}}, **cost
    )


def test_a_spread_is_the_mean_the_sample_deviation_and_student_s_interval():
    """Five values 1 … 5: mean 3, deviation √2.5, t(4) = 2.776."""
    spread = Spread.of([1, 2, 3, 4, 5])
    assert spread.mean == 3
    assert spread.deviation == pytest.approx(2.5**0.5)
    assert spread.high - spread.mean == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)
    assert spread.mean - spread.low == pytest.approx(spread.high - spread.mean)
    assert Spread.of([7.0]) == Spread(7.0, 0.0, 7.0, 7.0)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    for count in (3, 14):
        spreads = [Spread.of(draw.normal(1.0, 2.0, count)) for _ in range(2000)]
        assert sum(s.low <= 1.0 <= s.high for s in spreads) / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_share_of_the_gap_lies_between_warm_start_and_teacher():
    [row] = table_rows({"gkd": {0: result(0.5), 1: result(0.7)}}, teacher=result(1.0), start=result(0.2))
    assert row.gap_closed["greedy"]["accuracy"] == pytest.approx(0.5)
    [row] = table_rows({"gkd": {0: result(0.5)}}, teacher=result(0.5), start=result(0.5))
    assert row.gap_closed == {}


def test_failed_runs_are_shown_and_the_others_stay():
    table = table_rows(
        {
            "kd": {0: result(0.4, [1, 0, 0, 1], seconds=10.0, tokens=100.0), 1: "the disk is full"},
            "gkd": {0: result(0.6, [1, 1, 0, 1], seconds=30.0, tokens=90.0), 1: result(0.7, [1, 1, 0, 1])},
            "dpkd": {0: "no teacher", 1: "no teacher"},
        },
        baseline="kd",
    )
    assert [row.seeds for row in table] == [1, 2, 0]
    assert table[0].difference == {}
    assert table[1].difference["greedy"]["accuracy"].mean == pytest.approx(0.25)  # over the seed that both have
    assert table[1].seconds is None
    text = markdown(table, [("greedy", "accuracy"), ("greedy", "bleu")], {"teacher": result(1.0)})
    rows = text.splitlines()
    assert rows[0].startswith("| model | accuracy (greedy) | bleu (greedy) |")
    assert rows[2].startswith("| teacher | 100.0 | 10.00 |")
    assert rows[3].startswith("| kd (1 failed) | 40.0 | 4.000 |")
    assert rows[4].startswith("| gkd | 65.0 ± 7.1 |")
    assert "- kd, seed 1: the disk is full" in rows
    assert all(row.count("|") == rows[0].count("|") for row in rows[:6])


def test_gains_are_over_the_warm_start_on_the_same_prompts_in_every_metric_with_a_number_per_response():
    start = Result({"greedy": {"accuracy": 0.25}}, {"greedy": {"accuracy": [0, 0, 0, 1], "rouge_l": [10, 20, 30, 40]}})
    runs = [
        Result({"greedy": {"accuracy": 0.75, "rouge_l": 50.0}}, {"greedy": {"accuracy": correct, "rouge_l": rouge}})
        for correct, rouge in (([1, 1, 0, 1], [50, 50, 50, 50]), ([0, 1, 1, 1], [60, 60, 60, 60]))
    ]
    [row] = table_rows({"gkd": dict(enumerate(runs))}, start=start)
    gain = row.gain["greedy"]
    assert gain["accuracy"].mean == pytest.approx(0.5)
    assert gain["rouge_l"].mean == pytest.approx(30)
    assert gain["rouge_l"].low < 30 < gain["rouge_l"].high
    text = markdown([row], [("greedy", "rouge_l")], {})
    assert "| over warm start |" in text
    assert "+30.0 (" in text


def run_with(spent, by="budget", **budget):
    return result(0.5, budget={**budget, "spent": spent, "ended_by": by})


def test_a_budget_is_stated_and_runs_that_did_not_use_it_up_are_named():
    table = table_rows(
        {
            "kd": {0: run_with(1012, tokens=1000), 1: run_with(600, "max_steps", tokens=1000)},
            "gkd": {0: run_with(1001, tokens=1000), 1: "the disk is full"},
        }
    )
    assert table[0].budget == {"tokens": 1000}
    expected = [
        "Every run could spend 1,000 response tokens.",
        "kd, seed 1: max_steps ended the run with 600 of 1,000 response tokens spent.",
    ]
    assert budget_notes(table) == expected
    text = markdown(table, [("greedy", "accuracy")], {})
    assert text.endswith("".join(f"- {line}\n" for line in ["gkd, seed 1: the disk is full", *expected]))


def test_budgets_that_differ_are_stated_one_by_one_and_no_budget_is_not_stated():
    table = table_rows({"kd": {0: run_with(60, seconds=60)}, "gkd": {0: result(0.5)}, "lost": {0: "no teacher"}})
    assert budget_notes(table) == ["kd could spend 60 seconds of training.", "gkd had no budget."]
    assert budget_notes(table_rows({"gkd": {0: result(0.5)}})) == []
