"""What may change between an interruption and its resumption, and what is refused by name."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from filelock import FileLock
from folders import described, jsonl, llama, sums, write
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from understudy.recipe import RecipeError, load
from understudy.run import inputs
from understudy.run.distill import distill
from understudy.training.signals import Interrupted
from understudy.training.trainer import StudentTrainer

REWARD = "def brevity(prompts, responses, rows):\n    return [1 / (1 + len(text)) for text in responses]\n"


class Stop(TrainerCallback):
    """SIGTERM after the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), 15)


def quiet():
    return Console(file=open(os.devnull, "w"), width=200)


def recipe_in(home, **changes):
    """GKD with a reward in a module of the user, adapters, and held-out data."""
    content = described(
        home,
        student={"model": str(home / "small"), "peft": {"r": 2, "target_modules": "all-linear"}},
        method={"gkd": {"on_policy": 1.0, "reduction": "sequence", "distillation": 0.5}},
        reward={"functions": {"my_reward:brevity": 1.0}},
        evaluate={"dataset": str(home / "held_out.jsonl"), "split": "train", "show": 0},
    )
    training = {"max_steps": 3, "lr_scheduler_type": "constant", **changes.pop("training", {})}
    return write(home / "mine.yaml", {**content, **changes, "training": {**content["training"], **training}})


def stopped_run(home, monkeypatch, recipe):
    """The run of a recipe in `home`, stopped after one of its steps."""
    original = StudentTrainer.train

    def train(self, *args, **kwargs):
        self.callback_handler.callbacks.insert(0, Stop())
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "train", train)
        with pytest.raises(Interrupted) as error:
            distill(load(recipe), console=quiet())
    assert error.value.exit_code == 143


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    home = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        llama(home / "teacher")
        llama(home / "small", seed=5, num_hidden_layers=1)
        sums(home / "sums.jsonl")
        sums(home / "held_out.jsonl", count=3)
        (home / "my_reward.py").write_text(REWARD)
        stopped_run(home, patch, recipe_in(home))
        sys.modules.pop("my_reward", None)
    return home


@pytest.fixture
def home(template, tmp_path, monkeypatch):
    """A copy of the interrupted run and its models, with the recipe's paths in it."""
    shutil.copytree(template, tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    home = tmp_path / "home"
    for file in (home / "mine.yaml", home / "run" / "recipe.yaml"):
        file.write_text(file.read_text().replace(str(template), str(home)))
    yield home
    sys.modules.pop("my_reward", None)


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_tokenizer(home):
    (home / "small" / "chat_template.jinja").write_text("{{ messages }}")


CHANGES = {
    r"the training data .*sums\.jsonl": lambda home: sums(home / "sums.jsonl", count=13),
    r"the held-out data .*held_out\.jsonl": lambda home: sums(home / "held_out.jsonl", count=4),
    "the weights of the teacher": lambda home: change_weights(home / "teacher"),
    "the student's weights at the start": lambda home: change_weights(home / "small"),
    "the tokenizer": change_tokenizer,
    "the code of my_reward": lambda home: (home / "my_reward.py").write_text(REWARD.replace("1 +", "2 +")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_since_an_interruption_is_refused_by_name_or_accepted(name, home):
    CHANGES[name](home)
    with pytest.raises(RecipeError, match=rf"mine\.yaml.*: {name} ha[sv]e? changed since .*--accept-changes") as error:
        distill(load(home / "mine.yaml"), console=quiet())
    assert "mine.yaml, line" in str(error.value) or name in ("the tokenizer", "the code of my_reward")
    if name == "the weights of the teacher":
        assert distill(load(home / "mine.yaml"), accept_changes=True, console=quiet())["steps"] == 3


def test_another_version_of_a_package_is_refused_with_both_versions(home, monkeypatch):
    original = inputs.version
    monkeypatch.setattr(inputs, "version", lambda name: "9.9" if name in ("torch", "peft") else original(name))
    with pytest.raises(RecipeError, match=r"torch \(.*, now 9\.9\) and peft \(.*, now 9\.9\) have changed"):
        distill(load(home / "mine.yaml"), console=quiet())


def test_another_corpus_is_refused(home, monkeypatch):
    (home / "corpus.txt").write_text("1+1=2\n2+2=4\n3+3=6\n")
    corpus = {"dataset": str(home / "corpus.txt"), "max_length": 16}
    recipe = recipe_in(home, method="dpkd", reward=None, corpus=corpus, training={"output_dir": str(home / "dpkd")})
    stopped_run(home, monkeypatch, recipe)
    (home / "corpus.txt").write_text("1+1=2\n2+2=4\n3+3=7\n")
    with pytest.raises(RecipeError, match=r"the corpus .*corpus\.txt has changed"):
        distill(load(recipe), console=quiet())


TOUCHING = {
    "training.learning_rate=0.001": r"training\.learning_rate \(absent, now 0\.001\)",
    "data.limit=11": r"data\.limit \(absent, now 11\)",
    "training.max_steps=2": r"training\.max_steps \(3, now 2\)",
}


@pytest.mark.parametrize("override", TOUCHING)
def test_a_recipe_that_makes_another_student_is_refused_with_its_keys_and_values(override, home):
    with pytest.raises(RecipeError, match=rf"another recipe, with other values of {TOUCHING[override]}.*--accept-chan"):
        distill(load(home / "mine.yaml", [override]), console=quiet())


@pytest.mark.parametrize("override", ["student.peft.r=4", "method=sft"])
def test_a_recipe_that_no_checkpoint_fits_is_refused_even_if_changes_are_accepted(override, home):
    overrides = [override] if "peft" in override else [override, "reward=null"]
    with pytest.raises(RecipeError, match="holds a run of another recipe") as error:
        distill(load(home / "mine.yaml", overrides), accept_changes=True, console=quiet())
    assert "--accept-changes" not in str(error.value)


def test_what_does_not_touch_the_mathematics_may_change(home):
    free = ["training.max_steps=4", "training.logging_steps=2", "training.save_steps=2", "training.report_to=[]"]
    free += ["training.save_total_limit=1", "training.disable_tqdm=false", "evaluate.show=1"]
    assert distill(load(home / "mine.yaml", free), console=quiet())["steps"] == 4
    assert yaml.safe_load((home / "run" / "recipe.yaml").read_text())["training"]["max_steps"] == 4


def test_a_longer_run_is_refused_where_the_schedule_depends_on_its_end(home):
    recipe = recipe_in(home, training={"lr_scheduler_type": "linear"})
    shutil.copy(recipe, home / "run" / "recipe.yaml")
    with pytest.raises(
        RecipeError, match=r"training\.max_steps \(3, now 5\) \(a run may be made longer if .* constant"
    ):
        distill(load(recipe, ["training.max_steps=5"]), console=quiet())


def test_a_finished_run_goes_on_with_more_steps_and_equals_the_longer_run(home):
    distill(load(home / "mine.yaml"), console=quiet())
    summary = distill(load(home / "mine.yaml", ["training.max_steps=5"]), console=quiet())
    assert summary["steps"] == 5
    whole = distill(load(home / "mine.yaml", ["training.max_steps=5"]), restart=True, console=quiet())
    assert whole["student_samples"] == summary["student_samples"]


def test_a_lower_learning_rate_is_accepted_as_the_error_advises(home):
    recipe = load(home / "mine.yaml", ["training.learning_rate=1e-6"])
    summary = distill(recipe, accept_changes=True, console=quiet())
    assert summary["accepted_changes"] == ["training.learning_rate (absent, now 1e-06)"]
    rates = [json.loads(line).get("learning_rate") for line in (home / "run" / "metrics.jsonl").open()]
    assert [rate for rate in rates if rate] == pytest.approx([5e-5, 1e-6, 1e-6])


def test_a_moved_folder_resumes(home):
    (home / "run").rename(home / "moved")
    summary = distill(load(home / "mine.yaml", [f"training.output_dir={home / 'moved'}"]), console=quiet())
    assert summary["steps"] == 3
    losses = [json.loads(line) for line in (home / "moved" / "metrics.jsonl").open()]
    assert [line["step"] for line in losses if "loss" in line] == [1, 2, 3]


def test_a_folder_in_which_another_process_trains_is_refused_and_that_of_a_dead_one_is_not(home, monkeypatch):
    code = (
        f"import sys, time; from filelock import FileLock; lock = FileLock({str(home / 'run/.understudy.lock')!r});"
        "lock.acquire(); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with monkeypatch.context() as patch:
        patch.setattr("understudy.run.distill.build", lambda *_: pytest.fail("models were loaded"))
        with pytest.raises(RecipeError, match=r"another process is training in .*run: wait until it has ended, or"):
            distill(load(home / "mine.yaml"), console=quiet())
    other.kill()
    other.wait()
    assert distill(load(home / "mine.yaml"), console=quiet())["steps"] == 3


def test_a_run_is_locked_while_it_trains(home, monkeypatch):
    original = StudentTrainer.train

    def train(self, *args, **kwargs):
        lock = FileLock(home / "run" / ".understudy.lock", timeout=0)
        with pytest.raises(TimeoutError):
            lock.acquire()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "train", train)
    distill(load(home / "mine.yaml"), console=quiet())


def test_seconds_are_summed_over_sessions(home):
    state = home / "run" / "checkpoint-1" / "distillation.safetensors"
    tensors = load_file(state)
    tensors["spent"][-2:] = torch.tensor([1000.0, 3000.0])
    save_file(tensors, state)
    from understudy.training import checkpoint

    checkpoint.complete(state.parent)
    summary = distill(load(home / "mine.yaml"), console=quiet())
    assert 1000 < summary["seconds"] < 1100
    assert 3000 < summary["cpu_seconds"] < 3200


@pytest.mark.parametrize("content", ["{", '{"student_samples": 3}', None])
def test_a_damaged_before_json_is_measured_again(content, home):
    file = home / "run" / "before.json"
    right = file.read_text()
    file.unlink() if content is None else file.write_text(content)
    distill(load(home / "mine.yaml"), console=quiet())
    assert json.loads(file.read_text()) == json.loads(right)


def test_a_damaged_recipe_yaml_is_refused_with_a_sentence(home):
    (home / "run" / "recipe.yaml").write_text("student: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read, which says whose run this is: restore it"):
        distill(load(home / "mine.yaml"), console=quiet())


def test_the_only_checkpoint_is_not_thrown_away_because_it_is_damaged(home):
    (home / "run" / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(
        RecipeError, match=r"checkpoint-1 is damaged \(optimizer\.pt is missing\), and there is no other"
    ):
        distill(load(home / "mine.yaml"), console=quiet())
    assert (home / "run" / "checkpoint-1" / "adapter_model.safetensors").exists()


def test_no_temporary_files_of_a_killed_process_come_into_the_student(home):
    (home / "run" / "student.partial").mkdir()
    (home / "run" / "student.partial" / "model.safetensors.tmp").write_text("half")
    distill(load(home / "mine.yaml"), console=quiet())
    assert not list((home / "run").rglob("*.tmp"))
    assert not (home / "run" / "student.partial").exists()


def test_the_teacher_s_responses_are_not_reused_with_other_weights(home, monkeypatch):
    jsonl(home / "prompts.jsonl", [{"prompt": f"{i}+1="} for i in range(4)])
    changes = {"method": "seqkd", "reward": None, "data": {"dataset": str(home / "prompts.jsonl"), "max_length": 32}}
    recipe = recipe_in(home, **changes, evaluate={"show": 0}, training={"output_dir": str(home / "seqkd")})
    distill(load(recipe), console=quiet())
    responses = (home / "seqkd" / "teacher_responses.jsonl").read_text().splitlines()
    for name in ("student", "checkpoint-2", "checkpoint-3"):
        shutil.rmtree(home / "seqkd" / name)
    change_weights(home / "teacher")
    distill(load(recipe), console=quiet())
    again = (home / "seqkd" / "teacher_responses.jsonl").read_text().splitlines()
    assert again[: len(responses)] == responses
    assert len(again) == 2 * len(responses)
