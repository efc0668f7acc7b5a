"""Timers, counts and means, and the log line of all processes."""

import time
from types import SimpleNamespace

import pytest
import torch
from fakes import some_examples

from understudy.batch import Batch
from understudy.training import step_metrics
from understudy.training.step_metrics import StepMetrics

ALONE = SimpleNamespace(num_processes=1)


def test_a_timer_leaves_out_the_timers_inside_it(monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 20.0])  # learn from 0 to 20, score from 10 to 13
    metrics = StepMetrics()
    monkeypatch.setattr(step_metrics, "_now", lambda: next(clock))
    with metrics.timer("learn"), metrics.timer("score"):
        pass
    line = metrics.log_line(ALONE)
    assert (line["seconds_learn"], line["seconds_score"], line["seconds_generate"]) == (17, 3, 0)


def test_a_timer_counts_a_block_that_raises(monkeypatch):
    clock = iter([0.0, 2.0])
    metrics = StepMetrics()
    monkeypatch.setattr(step_metrics, "_now", lambda: next(clock))
    with pytest.raises(KeyError), metrics.timer("generate"):
        raise KeyError
    assert metrics.log_line(ALONE)["seconds_generate"] == 2


def test_responses_are_counted_and_values_are_means_over_their_elements():
    metrics = StepMetrics()
    metrics.count(Batch.from_examples(some_examples(), 0))
    metrics.record({"reward": torch.tensor([1.0, 2.0]), "empty": torch.tensor([])})
    metrics.record({"reward": torch.tensor(6.0)})
    line = metrics.log_line(ALONE)
    assert (line["tokens"], line["response_length"], line["truncated"]) == (14, 14 / 3, 0)
    assert line["reward"] == 3
    assert "empty" not in line
    assert line["tokens_per_second"] > 0
    later = metrics.log_line(ALONE)
    assert not {"reward", "tokens"} & later.keys(), "the next line begins anew"


def test_names_may_differ_from_process_to_process(monkeypatch):
    def gather(parts):
        counts = {"responses": 1.0, "tokens": 5.0, "truncated": 1.0}
        return [*parts, (counts, {"margin": 8.0, "reward": 1.0}, {"margin": 4.0, "reward": 2.0})]

    monkeypatch.setattr(step_metrics, "gather_object", gather)
    metrics = StepMetrics()
    metrics.record({"reward": torch.tensor([4.0, 7.0])})
    line = metrics.log_line(SimpleNamespace(num_processes=2))
    assert (line["reward"], line["margin"]) == (3, 2)
    assert (line["tokens"], line["truncated"]) == (5, 1)


def test_one_process_does_not_communicate(monkeypatch):
    monkeypatch.setattr(step_metrics, "gather_object", None)
    start = time.perf_counter()
    line = StepMetrics().log_line(ALONE)
    assert 0 <= line["seconds_other"] <= time.perf_counter() - start + 1
