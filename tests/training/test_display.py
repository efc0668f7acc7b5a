"""What a run shows: samples as plain text, a bar as wide as its terminal, a line without one; no fatal error."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from fakes import ScriptedRollout, ragged_examples, tiny, words
from loop import trainer, weights
from rich.console import Console
from transformers import TrainerState

from understudy import terminal
from understudy.batch import Example
from understudy.budget import Budget
from understudy.methods.kd import KD
from understudy.rollout import Writer
from understudy.sampling import Sampling
from understudy.training.display import ShowProgress, ShowSamples
from understudy.training.spending import Spending

ARGS = SimpleNamespace(seed=0, world_size=1, fp16=False, output_dir="runs/x")


@pytest.fixture(autouse=True)
def nothing_failed_yet(monkeypatch):
    monkeypatch.setattr(terminal, "_failed_displays", set())


def state_at(step, total=10):
    return TrainerState(global_step=step, max_steps=total, is_world_process_zero=True)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_progress_without_a_terminal_is_a_plain_line_for_every_logging_step():
    out = io.StringIO()
    bar = ShowProgress(Console(file=out, force_terminal=False, width=40))
    bar.on_train_begin(ARGS, state_at(0), None)
    for step in range(1, 11):
        bar.on_step_end(ARGS, state_at(step), None)
        if step % 5 == 0:
            bar.on_log(ARGS, state_at(step), None, {"loss": 1 / step, "forward_kl": 0.25, "epoch": 0.1})
    bar.on_log(ARGS, state_at(10), None, {"eval_loss": 3.0})
    bar.on_log(ARGS, state_at(10), None, {"train_runtime": 3.0, "train_loss": 2.0})
    bar.on_train_end(ARGS, state_at(10), None)
    lines = out.getvalue().splitlines()
    assert not {"\x1b", "\r"} & set(out.getvalue())
    assert [line.partition("  ")[0] for line in lines] == ["step 5/10", "step 10/10", "step 10/10"]
    assert lines[0].endswith("left  loss 0.2  forward_kl 0.25")
    assert lines[1:] == ["step 10/10  loss 0.1  forward_kl 0.25", "step 10/10  eval_loss 3"]


def test_only_the_first_process_shows_progress():
    out = io.StringIO()
    bar = ShowProgress(Console(file=out, force_terminal=False))
    state = TrainerState(global_step=5, max_steps=10, is_world_process_zero=False)
    bar.on_train_begin(ARGS, state, None)
    bar.on_step_end(ARGS, state, None)
    bar.on_log(ARGS, state, None, {"loss": 1.0})
    bar.on_train_end(ARGS, state, None)
    assert out.getvalue() == ""


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 200])
def test_steps_and_remaining_time_are_the_last_to_be_cut(width):
    spending = Spending(Budget(tokens=100_000))
    spending.tokens = 1000
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    bar = ShowProgress(console, spending)
    bar.on_train_begin(ARGS, state_at(0, 100_000), None)
    bar.on_step_end(ARGS, state_at(1234, 100_000), None)
    bar.on_log(ARGS, state_at(1234, 100_000), None, {"loss": 1.2345, "forward_kl": 0.5, "reverse_kl": 0.25})
    recorder = Console(file=io.StringIO(), width=width, record=True)
    recorder.print(bar.progress.get_renderable())
    bar.on_train_end(ARGS, state_at(1234, 100_000), None)
    [line] = recorder.export_text().splitlines()
    assert len(line) <= width
    assert "1234/" in line
    assert "-:--:--" in line
    assert ("loss 1.234" in line) == (width >= 60)
    assert ("reverse_kl 0.25" in line) == (width >= 200)


class Broken(io.StringIO):
    """A terminal that is gone, or whose encoding lacks a character."""

    encoding = "ascii"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), BrokenPipeError(), UnicodeEncodeError("ascii", "λ", 0, 1, "ordinal")]
)
def test_nothing_that_is_only_shown_ends_a_run(error, is_terminal, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("os.dup2", lambda *_: None)  # rich redirects this process's output after a closed pipe
    console = Console(file=Broken(error), force_terminal=is_terminal)
    run = trainer(tmp_path, KD(), options={"console": console}, disable_tqdm=False)
    samples = ShowSamples(run.writers.student, ragged_examples(2), words(), 2, tmp_path / "s.jsonl", console)
    run.add_callback(samples)
    run.train()
    assert run.state.global_step == 4
    assert len(lines_of(tmp_path / "s.jsonl")) == 4
    shown = [record.getMessage() for record in caplog.records if "cannot be shown" in record.getMessage()]
    assert 1 <= len(shown) <= 2, "once for the progress, once for the samples"


class Cacheless(ScriptedRollout):
    def generate(self, prompts, sampling, step):
        raise ValueError("this model has no key-value cache")


def test_a_student_that_cannot_generate_is_trained_without_samples(tmp_path, caplog):
    run = trainer(tmp_path, KD(), rollout=Cacheless())
    samples = ShowSamples(run.writers.student, ragged_examples(2), words(), 1, tmp_path / "s.jsonl")
    run.add_callback(samples)
    run.train()
    samples.show_last(run.args, run.state)
    assert run.state.global_step == 4
    assert caplog.text.count("samples of the student cannot be shown (this model has no key-value cache)") == 1


def test_the_cursor_is_restored_when_training_fails(tmp_path, monkeypatch):
    out = io.StringIO()
    options = {"console": Console(file=out, force_terminal=True)}
    run = trainer(tmp_path, KD(), options=options, disable_tqdm=False)

    def fail(*_, **__):
        raise ValueError("a loss that fails")

    monkeypatch.setattr(run, "compute_loss", fail)
    [bar] = [callback for callback in run.callback_handler.callbacks if isinstance(callback, ShowProgress)]
    with pytest.raises(ValueError, match="a loss that fails"):
        run.train()
    assert not bar.progress.live.is_started
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l"), "the cursor must be visible again"
