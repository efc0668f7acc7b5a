"""Trainer callbacks: complete log files, printable texts, and plain output without a terminal."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from fakes import ScriptedRollout, ragged_examples, tiny, words
from loop import trainer, weights
from rich.console import Console
from transformers import TrainerState

from understudy.batch import Example
from understudy.methods.kd import KD
from understudy.rollout import Writer
from understudy.sampling import Sampling
from understudy.training.callbacks import (
    CheckGradients,
    LogMetrics,
    ShowProgress,
    ShowSamples,
)

ARGS = SimpleNamespace(seed=0, world_size=1, fp16=False, output_dir="runs/x")


def state_at(step, total=10, **fields):
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=True, **fields)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_log_line_becomes_a_line_of_the_file(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    run = trainer(tmp_path, KD(), options={"callbacks": [LogMetrics(path)]}, logging_steps=2)
    run.train()
    lines = [line for line in lines_of(path) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    logged = [line for line in run.state.log_history if "loss" in line]
    assert [line["forward_kl"] for line in lines] == [line["forward_kl"] for line in logged]


def test_a_resumed_run_writes_the_file_as_it_was_at_its_checkpoint(tmp_path):
    """Without what was logged after the checkpoint, at its own step too, and without torn or lost lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "train_runtime": 2}\n{"step": 6, "loss": 3}\n{"step": 7, "lo')
    watch = LogMetrics(path)
    history = [{"loss": 1, "step": 2}, {"loss": 2, "note": "a\u2028b", "step": 4}]
    watch.on_train_begin(ARGS, state_at(4, log_history=history), None)
    watch.on_log(ARGS, state_at(6), None, {"loss": 5.0})
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [*history, {"step": 6, "loss": 5.0}]


def test_a_run_from_the_start_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n')
    LogMetrics(path).on_train_begin(ARGS, state_at(0), None)
    assert path.read_text() == ""


def test_only_the_first_process_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    other = TrainerState(global_step=1, is_world_process_zero=False)
    LogMetrics(path).on_train_begin(ARGS, other, None)
    LogMetrics(path).on_log(ARGS, other, None, {"loss": 1.0})
    assert not path.exists()


class Speaking:
    """A tokenizer whose every response decodes to one text."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids, skip_special_tokens):
        return self.text


def show_sample(text, folder, width=120):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=width)
    samples = ShowSamples(
        Writer(ScriptedRollout()), [Example([4], [5])], Speaking(text), 1, folder / "samples.jsonl", console
    )
    samples.on_train_begin(ARGS, state_at(0), None)
    samples.on_step_end(ARGS, state_at(1), None)
    return out.getvalue(), lines_of(folder / "samples.jsonl")


@pytest.mark.parametrize(
    "text", ["[bold red]x[/bold red]", "[/nope]", "[link=http://e.org]x[/link]", ":smile:", "a\\[b]"]
)
def test_markup_in_a_text_is_shown_as_it_is(text, tmp_path):
    screen, lines = show_sample(text, tmp_path)
    assert screen.count(text) == 3
    assert lines == [{"step": 1, "prompt": text, "student": text, "reference": text}]


@pytest.mark.parametrize(
    "text",
    ["\x1b[2Jgone", "\x1b]0;title\x07", "a\rb", "\x9b31mred", "a\bb", "\x00", "abc\u202etxt", "\x7f", "a\x0bb\x0cc"],
)
def test_control_codes_in_a_text_do_not_reach_the_terminal(text, tmp_path):
    screen, lines = show_sample(text, tmp_path)
    clean, _ = show_sample("harmless", tmp_path / "other")
    bad = {c for c in text if not c.isprintable()} - {"\x1b"}
    assert not bad & set(screen)
    assert screen.count("\x1b") == clean.count("\x1b"), "only the table's own styles"
    assert lines[0]["student"] == text


def test_a_long_text_is_shown_by_its_end_and_saved_completely(tmp_path):
    text = "x" * 400 + "end"
    screen, lines = show_sample(text, tmp_path)
    assert screen.count("x") == 3 * 295
    wide, _ = show_sample(text, tmp_path / "wide", width=1200)
    assert wide.count("xend") == 3
    assert lines[0]["student"] == text


def test_samples_are_shown_every_so_often_with_the_same_draws(tmp_path):
    writer = Writer(ScriptedRollout(), Sampling(n=3))
    samples = ShowSamples(writer, ragged_examples(2), words(), 3, tmp_path / "s.jsonl", Console(file=io.StringIO()))
    samples.on_train_begin(ARGS, state_at(0), None)
    for step in range(1, 8):
        samples.on_step_end(ARGS, state_at(step), None)
    lines = lines_of(tmp_path / "s.jsonl")
    assert [line["step"] for line in lines] == [3, 3, 6, 6]
    assert [line["student"] for line in lines[:2]] == [line["student"] for line in lines[2:]]


def test_samples_do_not_disturb_training(tmp_path):
    runs = []
    for every in (0, 1):
        run = trainer(tmp_path, KD(), tiny("gpt2", seed=1))
        console = Console(file=io.StringIO())
        run.add_callback(
            ShowSamples(run.writers.student, ragged_examples(2), words(), every, tmp_path / "samples.jsonl", console)
        )
        run.train()
        runs.append(weights(run.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_progress_without_a_terminal_prints_one_plain_line():
    out = io.StringIO()
    bar = ShowProgress(Console(file=out, force_terminal=False, width=100))
    bar.on_train_begin(ARGS, state_at(0), None)
    for step in range(1, 11):
        bar.on_step_end(ARGS, state_at(step), None)
        bar.on_log(ARGS, state_at(step), None, {"loss": 1 / step})
    bar.on_train_end(ARGS, state_at(10), None)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(text.splitlines()) == 1
    assert "10/10" in text


def test_the_cursor_is_restored_when_training_fails(tmp_path):
    out = io.StringIO()
    run = trainer(tmp_path, KD(), examples=ragged_examples(4, responses=False))
    bar = ShowProgress(Console(file=out, force_terminal=True))
    run.add_callback(bar)
    with pytest.raises(ValueError, match="empty response"):
        run.train()
    assert not bar.progress.live.is_started
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l"), "the cursor must be visible again"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_in_any_parameter(value):
    model = tiny("llama")
    parameters = list(model.parameters())
    parameters[0].grad = torch.zeros_like(parameters[0])
    CheckGradients().on_pre_optimizer_step(ARGS, state_at(3), None, model=model)
    parameters[-1].grad = torch.zeros_like(parameters[-1])
    parameters[-1].grad.view(-1)[3] = value
    with pytest.raises(FloatingPointError, match="at step 3, though the loss is a number"):
        CheckGradients().on_pre_optimizer_step(ARGS, state_at(3), None, model=model)


class Synced(ScriptedRollout):
    """Records the steps of its `sync` calls."""

    def sync(self, step):
        self.calls.append(step.number)


def test_a_rollout_is_synced_when_the_student_s_weights_have_changed(tmp_path):
    rollout = Synced()
    run = trainer(tmp_path, KD(), rollout=rollout, max_steps=3)
    run.train()
    assert rollout.calls == [0, 1, 2, 3, 3], "and once more at the end, when the best checkpoint may have been loaded"
