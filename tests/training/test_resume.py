"""A run that was killed, interrupted or has an incomplete checkpoint resumes bit by bit.

The uninterrupted run happens in this process, the others through the command line in processes of their own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fakes import ragged_examples, tiny, words
from loop import same, teacher, trainer, weights
from safetensors.torch import load_file
from torch import nn

from understudy.divergences import ForwardKL
from understudy.method import Method
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.recipe import load
from understudy.run.distill import distill
from understudy.training.checkpoint import damage, last_checkpoint

STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """GKD with mixed data and dropout in the student; two epochs and a bit, so that the order of data matters."""
    folder = tmp_path_factory.mktemp("recipe")
    pupil = tiny("gpt2", seed=1)
    pupil.config.resid_pdrop = pupil.config.embd_pdrop = 0.1
    for name, model in {"student": pupil, "teacher": tiny("gpt2", width=24, seed=2)}.items():
        model.save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    rows = [
        {"prompt": " ".join(f"w{i}" for i in e.prompt), "completion": " ".join(f"w{i}" for i in [*e.response[:-1], 7])}
        for e in ragged_examples(18)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {
        "student": {"model": str(folder / "student")},
        "teacher": {"local": {"model": str(folder / "teacher")}},
        "method": {"gkd": {"on_policy": 0.6}},
        "rollout": {"generate": {"max_new_tokens": 6}},
        "data": {"dataset": str(folder / "data.jsonl"), "max_length": 32},
        "evaluate": {"dataset": str(folder / "data.jsonl"), "limit": 4, "show": 2, "show_every": 8},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_steps": 4,
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    (folder / "gkd.yaml").write_text(json.dumps(text))
    return folder / "gkd.yaml"


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distill(load(recipe, [f"training.output_dir={folder}"]))
    return folder


def command(recipe, folder, *changed):
    return [sys.executable, "-m", "understudy", "distill", str(recipe), f"training.output_dir={folder}", *changed]


def stopped_at(recipe, folder, ready, how, *changed):
    """Start the run, send it a signal once `ready()`, and return its exit code."""
    run = subprocess.Popen(
        command(recipe, folder, *changed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200  # a busy machine
    while not ready():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(run.pid, how)
    run.communicate(timeout=90)
    return run.returncode


def is_complete(path):
    return path.exists() and damage(path) is None


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_the_same(folder, other):
    student = load_file(folder / "student" / "model.safetensors")
    assert same(student, load_file(other / "student" / "model.safetensors"))
    losses, expected = ([line for line in lines(f) if "loss" in line] for f in (folder, other))
    assert [line["step"] for line in losses] == list(range(3, STEPS + 1, 3)), "a step twice, or none at all"
    evaluated, expected_evaluations = (
        [(e["step"], e["eval_loss"]) for e in lines(f) if "eval_loss" in e] for f in (folder, other)
    )
    assert evaluated == expected_evaluations
    assert losses[-1]["loss"] == expected[-1]["loss"]
    assert lines(folder, "samples.jsonl") == lines(other, "samples.jsonl")
    results, expected_results = (json.loads((f / "run.json").read_text()) for f in (folder, other))
    for summary in (results, expected_results):
        summary["metrics"].pop("eval_tokens_per_second")
    for key in ("steps", "tokens", "student_samples", "metrics", "fingerprint"):
        assert results[key] == expected_results[key], key


def test_a_killed_run_resumes_to_the_bit(recipe, uninterrupted, tmp_path):
    """kill −9 in the middle; then the newest checkpoint is damaged as well, and the run resumes from the one before."""
    folder = tmp_path / "run"
    code = stopped_at(recipe, folder, lambda: is_complete(folder / "checkpoint-8"), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (folder / "run.json").exists()
    newest = Path(last_checkpoint(folder))
    assert int(newest.name.split("-")[1]) < STEPS, "it was killed too late"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(folder) != str(newest)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 23, "loss": 9.0}\n{"step": 24, "lo')
    done = subprocess.run(command(recipe, folder), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert_the_same(folder, uninterrupted)


def uninterrupted_and_killed(recipe, home, changed):
    """The folders of a run and of the same one killed after four steps and resumed, whose students are the same."""
    uninterrupted, killed = home / "whole", home / "killed"
    distill(load(recipe, [*changed, f"training.output_dir={uninterrupted}"]))
    code = stopped_at(recipe, killed, lambda: is_complete(killed / "checkpoint-4"), signal.SIGKILL, *changed)
    assert code == -signal.SIGKILL
    assert not (killed / "run.json").exists(), "it was killed too late"
    distill(load(recipe, [*changed, f"training.output_dir={killed}"]))
    assert same(*(load_file(f / "student" / "model.safetensors") for f in (killed, uninterrupted)))
    return uninterrupted, killed


@pytest.mark.parametrize("method", ["{promptkd: {prompt_tokens: 3, prompt: w5}}", "{dpkd: {refresh: 3}}"])
def test_a_killed_run_with_a_state_of_its_own_resumes_to_the_bit(method, recipe, tmp_path):
    """PromptKD's prompt and its optimizer; DPKD's responses of teacher and student."""
    changed = [
        f"method={method}",
        "training.max_steps=12",
        "evaluate.dataset=null",
        "training.eval_strategy='no'",
        "training.eval_steps=null",
    ]
    uninterrupted, killed = uninterrupted_and_killed(recipe, tmp_path, changed)
    if "promptkd" in method:
        assert same(*(load_file(f / "soft_prompt" / "adapter_model.safetensors") for f in (killed, uninterrupted)))


def test_a_killed_run_with_a_budget_resumes_to_the_bit_and_spends_it_once(recipe, tmp_path):
    """With a warm-up, after whose end the learning rate falls with what is left of the budget."""
    changed = ["budget.tokens=250", "training.max_steps=1000", "training.warmup_steps=3", "training.logging_steps=1"]
    changed += ["evaluate.dataset=null", "training.eval_strategy='no'", "training.eval_steps=null"]
    uninterrupted, killed = uninterrupted_and_killed(recipe, tmp_path, changed)
    rates, expected = ([line["learning_rate"] for line in lines(f) if "loss" in line] for f in (killed, uninterrupted))
    assert rates == expected
    summary, expected_summary = (json.loads((f / "run.json").read_text()) for f in (killed, uninterrupted))
    assert 8 < summary["steps"] == expected_summary["steps"] < 24
    assert (
        summary["budget"]
        == expected_summary["budget"]
        == {"tokens": 250, "spent": summary["tokens"], "ended_by": "budget"}
    )
    assert 250 <= summary["tokens"] < 290


def test_an_interrupted_run_saves_exits_with_130_and_resumes_to_the_bit(recipe, uninterrupted, tmp_path):
    folder = tmp_path / "run"

    def ready():
        path = folder / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= 2

    assert stopped_at(recipe, folder, ready, signal.SIGINT) == 130
    saved = last_checkpoint(folder)
    assert saved is not None
    assert not (folder / "student").exists()
    distill(load(recipe, [f"training.output_dir={folder}"]))
    assert_the_same(folder, uninterrupted)


def test_a_finished_run_is_not_run_again(recipe, uninterrupted):
    assert not (uninterrupted / "student" / "distillation.safetensors").exists(), "that is a checkpoint's"
    before = (uninterrupted / "student" / "model.safetensors").stat().st_mtime_ns
    summary = distill(load(recipe, [f"training.output_dir={uninterrupted}"]))
    assert summary == json.loads((uninterrupted / "run.json").read_text())
    assert (uninterrupted / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_killed_between_its_last_step_and_its_end_only_ends(recipe, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "student")
    own = folder / "recipe.yaml"
    own.write_text(own.read_text().replace(str(uninterrupted), str(folder)))
    distill(load(recipe, [f"training.output_dir={folder}"]))
    assert same(*(load_file(f / "student" / "model.safetensors") for f in (folder, uninterrupted)))


@dataclass
class Ramp(Method):
    """A schedule with state, which does not follow from the step's number alone, as TAID's."""

    share: float = 0.1

    def loss(self, teacher, student, batch):
        log_q, log_p = student.log_probs, teacher.log_probs
        target = ((1 - self.share) * log_q.detach() + self.share * log_p).log_softmax(-1)
        return ForwardKL()(target, log_q)

    def after_step(self, step):
        self.share += 0.3 * (1 - self.share)

    def state_dict(self):
        return {"share": torch.tensor(self.share, dtype=torch.float64)}

    def load_state_dict(self, state):
        self.share = float(state["share"])


def dropping(kind="gpt2"):
    model = tiny(kind, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize("make", [Ramp, KD, lambda: GKD(on_policy=0.5)], ids=["ramp", "kd", "gkd"])
@pytest.mark.parametrize("stop", [2, 5], ids=["within an epoch", "within the second epoch"])
def test_training_in_two_parts_equals_training_at_once(make, stop, tmp_path):
    """With dropout; in a method of its own state; twice, the second time from a folder with more checkpoints."""
    common = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", "max_steps": 8}
    uninterrupted = trainer(tmp_path / "whole", make(), dropping(), teacher("gpt2"), **common)
    uninterrupted.train()
    resumed = trainer(tmp_path / "part", make(), dropping(), teacher("gpt2"), **common)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "part" / f"checkpoint-{stop}")
    (tmp_path / "part" / f"checkpoint-{stop + 1}").mkdir()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert same(weights(uninterrupted.model), weights(resumed.model))
    assert uninterrupted.method == resumed.method
    assert uninterrupted.tokens_seen == resumed.tokens_seen


def test_resuming_where_there_is_nothing_starts_from_the_beginning(tmp_path):
    run = trainer(tmp_path, KD())
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4
