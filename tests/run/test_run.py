"""A run, end to end: the files in its folder, loading its student, and running the same command again."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from folders import characters, described, jsonl, link_all, llama, sums, write
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from understudy.data.examples import DataError
from understudy.recipe import RecipeError, load, parse
from understudy.run.arguments import training_arguments
from understudy.run.build import build
from understudy.run.distill import distill
from understudy.training.signals import Interrupted
from understudy.training.trainer import StudentTrainer

IDS = torch.tensor([[5, 9, 12, 7, 30, 4]])


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    things = tmp_path_factory.mktemp("things")
    llama(things / "teacher")
    llama(things / "small", seed=5, num_hidden_layers=1)
    sums(things / "sums.jsonl")
    return things


@pytest.fixture
def home(tmp_path, things):
    link_all(things, tmp_path)
    return tmp_path


def recipe_of(home, **changes):
    return load(write(home / "mine.yaml", described(home, **changes)))


def quiet():
    return Console(file=open(os.devnull, "w"), width=200)


def run(home, restart=False, **changes):
    return distill(recipe_of(home, **changes), restart=restart, console=quiet())


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["sft", "kd", "seqkd", "gkd", {"seqkd": {"soft_weight": 0.5}}], ids=str)
def test_a_run_leaves_everything_behind(method, home):
    summary = run(home, method=method, evaluate={"dataset": str(home / "sums.jsonl"), "limit": 4, "show_every": 1})
    folder = home / "run"
    optional = {"teacher_responses.jsonl"} if "seqkd" in str(method) else set()
    assert {path.name for path in folder.iterdir()} == optional | {
        *("recipe.yaml", "run.json", "before.json", "metrics.jsonl", "samples.jsonl", "student"),
        *("checkpoint-1", "checkpoint-2", ".understudy", ".understudy.lock", "inputs.json"),
    }
    assert json.loads((folder / "run.json").read_text()) == summary
    assert summary["steps"] == 2
    assert summary["examples"] == 12
    assert "eval_loss" in summary["metrics"]
    assert {"seconds", "tokens", "versions", "machine", "fingerprint", "student_parameters"} <= summary.keys()
    assert bool(summary["student_samples"]["after"]) == (method != "sft")
    assert (
        load(folder / "recipe.yaml").resolved()
        == recipe_of(
            home, method=method, evaluate={"dataset": str(home / "sums.jsonl"), "limit": 4, "show_every": 1}
        ).resolved()
    )
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] == [1, 2]
    assert {line["step"] for line in lines(folder / "samples.jsonl")} == {1, 2}
    assert {path.suffix for path in (folder / "student").iterdir()} == {".json", ".safetensors"}, "no pickle"
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert tokenizer.get_vocab() == characters().get_vocab()
    assert model.config.hidden_size == 8
    assert sum(p.numel() for p in model.parameters()) == summary["student_parameters"]


def test_the_saved_student_is_the_one_that_was_trained(home):
    run(home, method="sft")
    saved, last = (load_file(home / "run" / name / "model.safetensors") for name in ("student", "checkpoint-2"))
    assert saved.keys() == last.keys()
    assert all(torch.equal(saved[name], last[name]) for name in saved)


ADAPTERS = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def test_a_student_with_adapters_loads_from_its_folder(home):
    summary = run(home, student={"model": str(home / "small"), "peft": ADAPTERS}, method="kd")
    student = home / "run" / "student"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in student.iterdir()}
    assert not [path for path in student.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert 0 < summary["trained_parameters"] < summary["student_parameters"]
    loaded = AutoModelForCausalLM.from_pretrained(student)
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(home / "small")))


def test_a_merged_student_gives_the_adapters_logits_and_needs_no_peft(home, monkeypatch):
    block = {"model": str(home / "small"), "peft": ADAPTERS}
    adapters = run(home, student=block, method="kd")
    with_adapters = logits(AutoModelForCausalLM.from_pretrained(home / "run" / "student"))
    merged = run(home, student={**block, "merge": True}, method="kd", restart=True)
    student = home / "run" / "student"
    assert not [path for path in student.iterdir() if "adapter" in path.name]
    assert merged["trained_parameters"] == adapters["trained_parameters"]
    for when in ("before", "after"):
        assert merged["student_samples"][when] == pytest.approx(adapters["student_samples"][when])
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # every import of it is an error
    merged_logits = logits(AutoModelForCausalLM.from_pretrained(student))
    torch.testing.assert_close(merged_logits, with_adapters, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("origin", [{"layers": [0, 2]}, {"fresh": {"num_hidden_layers": 1}}], ids=str)
def test_adapters_on_a_student_made_from_the_teacher_are_merged(origin, home):
    run(home, student={**origin, "peft": ADAPTERS, "merge": True}, method="sft")
    logits(AutoModelForCausalLM.from_pretrained(home / "run" / "student"))


def snapshot(folder):
    """Times and sizes, without the lock, which some versions of filelock open for writing."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name != ".understudy.lock")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def contents(folder):
    """Every file's bytes, and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


NAMES = ["run.json", "metrics.jsonl", "recipe.yaml", "teacher_responses.jsonl", "run.json.partial", ".understudy"]
NAMES += ["checkpoint-500/model.bin", "student/model.bin", "report/index.html", "soft_prompt/mine.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("restart", [False, True])
def test_files_that_no_run_wrote_are_refused_and_stay(name, restart, home):
    file = home / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    (home / "run" / "thesis.txt").write_text("the only copy")
    before = contents(home / "run")
    taken = home / "run" / name.split("/")[0]
    with pytest.raises(RecipeError, match=rf"{taken} exists already and was not written by a run: give another train"):
        run(home, restart=restart, method="sft")
    assert contents(home / "run") == before


@pytest.mark.parametrize("restart", [False, True])
def test_a_recipe_with_a_mistake_writes_nothing_into_a_folder(restart, home):
    (home / "run").mkdir()
    (home / "run" / "thesis.txt").write_text("the only copy")
    before = contents(home / "run")
    with pytest.raises(DataError):
        run(home, restart=restart, data={"dataset": str(home / "nope.jsonl")})
    assert contents(home / "run") == before


@pytest.mark.parametrize(
    "mistake", [{"method": "nosuch"}, {"data": {"dataset": "nope.jsonl"}}, {"student": {"model": "./nowhere"}}], ids=str
)
def test_a_restart_with_a_mistake_leaves_the_finished_run(mistake, home):
    run(home, method="sft")
    before = contents(home / "run")
    with pytest.raises(ValueError, match=r"nosuch|nope\.jsonl|nowhere"):
        run(home, restart=True, **{"method": "sft", **mistake})
    assert contents(home / "run") == before


def test_a_restart_deletes_only_what_runs_and_reports_write(home):
    run(home, method="sft")
    mine = ["thesis.txt", "checkpoint-best/notes.txt", "responses-mine.jsonl", "report/notes.txt"]
    for name in mine:
        (home / "run" / name).parent.mkdir(exist_ok=True)
        (home / "run" / name).write_text("mine")
    (home / "run" / "checkpoint-77").mkdir()
    run(home, restart=True, method="sft")
    assert [(home / "run" / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not (home / "run" / "checkpoint-77").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_another_program_s_checkpoint_in_a_run_s_folder_is_refused_and_stays(restart, home):
    run(home, method="sft")
    (home / "run" / "run.json").unlink()
    (home / "run" / "checkpoint-500").mkdir()
    (home / "run" / "checkpoint-500" / "model.bin").write_text("mine")
    before = contents(home / "run")
    with pytest.raises(RecipeError, match="checkpoint-500 exists already and was not written by a run"):
        run(home, restart=restart, method="sft")
    assert contents(home / "run") == before


def test_a_restart_generates_the_teacher_s_responses_again(home):
    run(home, method="seqkd")
    file = home / "run" / "teacher_responses.jsonl"
    right = file.read_text()
    changed = [json.loads(line) | {"tokens": [5, 2], "truncated": False} for line in right.splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    run(home, method="seqkd", restart=True)
    assert sorted(file.read_text().splitlines()) == sorted(right.splitlines())


def test_a_finished_run_says_so_and_changes_nothing(home, capsys):
    first = run(home, method="sft")
    before = snapshot(home / "run")
    assert distill(recipe_of(home, method="sft")) == first
    assert "is finished already; --restart runs it again" in capsys.readouterr().out.replace("\n", " ")
    assert snapshot(home / "run") == before
    (home / "run" / "run.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"run.json is not what a run writes: move it away, or restore it"):
        distill(recipe_of(home, method="sft"))


def test_the_resolved_recipe_runs_as_the_recipe_did(home):
    run(home, method="sft")
    before = snapshot(home / "run")
    distill(load(home / "run" / "recipe.yaml"), console=quiet())
    assert snapshot(home / "run") == before


def test_a_restart_has_the_same_result(home):
    first = run(home)
    weights = load_file(home / "run" / "student" / "model.safetensors")
    (home / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n')
    again = run(home, restart=True)
    assert again["student_samples"] == first["student_samples"]
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(home / "run/student/model.safetensors").items()
    )
    assert all(line.get("loss") != 99 for line in lines(home / "run" / "metrics.jsonl"))


class Stop(TrainerCallback):
    """A Ctrl-C after a step."""

    def __init__(self, step=1):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), 2)


@pytest.fixture
def interrupted(monkeypatch):
    """Every run is interrupted after its first step."""
    original = StudentTrainer.train

    def train(self, *args, **kwargs):
        self.callback_handler.callbacks.insert(0, Stop())
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "train", train)
        yield patch


def test_an_interrupted_run_resumes_with_the_same_result(home, interrupted):
    with pytest.raises(Interrupted, match="stopped after step 1; the same command resumes"):
        run(home)
    assert not (home / "run" / "run.json").exists()
    interrupted.undo()
    resumed = run(home)
    weights = load_file(home / "run" / "student" / "model.safetensors")
    uninterrupted = run(home, restart=True)
    assert resumed["student_samples"] == uninterrupted["student_samples"]
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(home / "run/student/model.safetensors").items()
    )


def test_an_interrupted_run_does_not_resume_with_other_data(home, interrupted):
    with pytest.raises(Interrupted):
        run(home)
    interrupted.undo()
    (home / "sums.jsonl").unlink()
    sums(home / "sums.jsonl", count=13)
    with pytest.raises(RecipeError, match=r"mine.yaml, line \d+: .*sums.jsonl has changed since the run in .* began"):
        run(home)
    assert run(home, restart=True)["examples"] == 13


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False)])
def test_bf16_may_be_left_to_the_machine(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe = {"student": {"model": "a"}, "method": "sft", "data": {"dataset": "b"}}
    assert training_arguments(parse({**recipe, "training": {"bf16": "auto", "use_cpu": True}})).bf16 is expected


def test_a_run_without_a_checkpoint_may_be_replaced_by_another_recipe(home, interrupted):
    interrupted.setattr(StudentTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(home)
    first = json.loads((home / "run" / "before.json").read_text())["student_samples"]
    interrupted.undo()
    (home / "sums.jsonl").unlink()
    sums(home / "sums.jsonl", count=13)
    summary = run(home, student={"model": str(home / "small")})
    assert summary["examples"] == 13
    assert summary["student_samples"]["before"] != first, "it is the other student's distance now"


def test_the_teacher_s_responses_are_reused_and_never_those_of_another_teacher(home, monkeypatch):
    run(home, method="seqkd")
    responses = (home / "run" / "teacher_responses.jsonl").read_text()
    assert len(responses.splitlines()) <= 12
    for name in ("student", "checkpoint-1", "checkpoint-2"):
        shutil.rmtree(home / "run" / name)
    authors = []
    from understudy.rollouts.generate import GenerateRollout

    original = GenerateRollout.generate

    def generate(self, prompts, sampling, step):
        authors.append(self._bound.author)
        return original(self, prompts, sampling, step)

    monkeypatch.setattr(GenerateRollout, "generate", generate)
    run(home, method="seqkd")
    assert "teacher" not in authors
    assert (home / "run" / "teacher_responses.jsonl").read_text() == responses
    for name in ("student", "checkpoint-1", "checkpoint-2"):
        shutil.rmtree(home / "run" / name)
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        run(home, method="seqkd", rollout={"generate": {"max_new_tokens": 4}})


def test_a_teacher_that_is_not_needed_is_not_loaded(home):
    recipe = recipe_of(home, method="sft")
    built = build(recipe, training_arguments(recipe), quiet())
    assert built.trainer.teacher is None


def test_training_keys_have_the_types_and_defaults_of_the_recipe():
    arguments = training_arguments(
        parse({"student": {"model": "a"}, "method": "sft", "data": {"dataset": "b"}}, "deep/gkd.yaml")
    )
    assert arguments.output_dir == "runs/gkd"
    assert arguments.report_to == []
    assert arguments.logging_steps == 10
    content = {"student": {"model": "a"}, "method": "sft", "data": {"dataset": "b"}}
    arguments = training_arguments(
        parse({**content, "training": {"learning_rate": "1e-3", "max_steps": 5.0, "use_cpu": "yes"}})
    )
    assert (arguments.learning_rate, arguments.max_steps, arguments.use_cpu) == (1e-3, 5, True)


def test_prompts_alone_are_enough_for_an_on_policy_method(home):
    jsonl(home / "prompts.jsonl", [{"prompt": f"{i}+1="} for i in range(8)])
    data = {"dataset": str(home / "prompts.jsonl"), "max_length": 32}
    assert run(home, method={"gkd": {"on_policy": 1.0}}, data=data)["steps"] == 2
    with pytest.raises(DataError, match="gkd trains on responses"):
        run(home, method={"gkd": {"on_policy": 0.5}}, data=data, restart=True)


def test_the_run_of_one_recipe_file_is_named_after_it(home, monkeypatch):
    monkeypatch.chdir(home)
    content = described(home, method="sft")
    del content["training"]["output_dir"]
    write(home / "plain.yaml", content)
    assert distill(load("plain.yaml"), console=quiet())["folder"] == str(Path("runs") / "plain")
    assert yaml.safe_load((home / "runs" / "plain" / "recipe.yaml").read_text())["method"] == {"sft": {}}


def test_a_corpus_goes_to_the_method_that_reads_one_and_to_no_other(home):
    (home / "corpus.txt").write_text("1+1=2\n2+2=4\n3+3=6\n")
    corpus = {"dataset": str(home / "corpus.txt"), "max_length": 16}
    summary = run(home, method="dpkd", corpus=corpus)
    assert summary["steps"] == 2
    built = build(recipe_of(home, method="dpkd", corpus=corpus), training_arguments(recipe_of(home)))
    assert [e.prompt for e in built.trainer.method._corpus]
    with pytest.raises(RecipeError, match="gkd reads no corpus; dpkd does"):
        run(home, restart=True, corpus=corpus)


def test_the_distance_of_student_samples_is_to_the_teacher_without_its_prompt(home):
    method = {"promptkd": {"prompt": "1", "initialize": "random", "prompt_tokens": 2}}
    built = build(recipe_of(home, method=method), training_arguments(recipe_of(home)))
    assert built.trainer.teacher is not built.teacher
    assert built.trainer.teacher.plain is built.teacher


def test_metrics_of_held_out_responses_choose_the_best_checkpoint_and_stop_early(home):
    """`training` sets when and by which metric; a student that does not change stops after `patience` evaluations."""
    look = {"dataset": str(home / "sums.jsonl"), "limit": 4, "show": 0, "metrics": ["chrf"], "patience": 2}
    training = {
        "output_dir": str(home / "best"),
        "max_steps": 9,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "metric_for_best_model": "eval_chrf",
        "load_best_model_at_end": True,
        "use_cpu": True,
    }
    content = described(home, method="sft", evaluate=look)
    summary = distill(load(write(home / "best.yaml", content | {"training": training})), console=quiet())
    evaluated = [line for line in lines(home / "best" / "metrics.jsonl") if "eval_chrf" in line]
    assert [line["step"] for line in evaluated] == [1, 2, 3, 3]  # once more at the end
    assert summary["steps"] == 3
    assert {"eval_chrf", "eval_accuracy", "eval_loss"} <= set(summary["metrics"])


@pytest.mark.parametrize(
    ("look", "complaint"),
    [
        ({"metrics": ["chrf"]}, "metrics need held-out data: add evaluate.dataset"),
        ({"metrics": ["bleux"], "dataset": "sums.jsonl"}, r'line \d+: there is no metric "bleux"; did you mean "bleu"'),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused(look, complaint, home):
    if "dataset" in look:
        look = {**look, "dataset": str(home / look["dataset"])}
    with pytest.raises(RecipeError, match=complaint):
        run(home, method="sft", evaluate=look)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_nosuch"}


@pytest.mark.parametrize(
    ("metric", "accepted"), [("forward_kl", True), ("chrf", True), ("rouge_l", False), ("x", False)]
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_anything_is_written(metric, accepted, home):
    look = {"dataset": str(home / "sums.jsonl"), "split": "train", "limit": 3, "show": 0, "metrics": ["chrf"]}
    content = described(home, method="kd", evaluate=look)
    content["training"] |= BEST | {"metric_for_best_model": metric}
    recipe = load(write(home / "mine.yaml", content))
    if accepted:
        build(recipe, training_arguments(recipe), quiet())
        return
    with pytest.raises(RecipeError, match=rf"mine\.yaml, line \d+: no evaluation gives the metric {metric}"):
        distill(recipe, console=quiet())
    assert not (home / "run" / "recipe.yaml").exists()


def test_patience_counts_on_in_a_resumed_run(home, monkeypatch):
    """With a learning rate of 0 nothing improves after the first evaluation: it stops after the third one."""
    look = {"dataset": str(home / "sums.jsonl"), "split": "train", "limit": 2, "show": 0, "patience": 2}
    content = described(home, method="sft", evaluate=look)
    content["training"] |= BEST | {"metric_for_best_model": "loss", "learning_rate": 0.0, "max_steps": 9}
    recipe = load(write(home / "mine.yaml", content))
    original = StudentTrainer.train

    def train(self, *args, **kwargs):
        self.callback_handler.callbacks.insert(0, Stop(2))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "train", train)
        with pytest.raises(Interrupted):
            distill(recipe, console=quiet())
    assert distill(recipe, console=quiet())["steps"] == 3


def test_patience_without_a_metric_is_refused_before_a_restart_deletes_anything(home):
    run(home, method="sft")
    before = contents(home / "run")
    with pytest.raises(RecipeError, match=r"patience needs training\.eval_strategy and metric_for_best_model"):
        run(home, restart=True, method="sft", evaluate={"patience": 2, "show": 0})
    assert contents(home / "run") == before
