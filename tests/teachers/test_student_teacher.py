"""The student as its own teacher: which weights score, what memory they take, exact resume, and what is refused."""

from dataclasses import replace

import pytest
import torch
from fakes import ragged_examples, tiny
from loop import arguments, same, short_sampling, student, trainer, weights
from transformers import TrainerCallback

from understudy.batch import Batch
from understudy.divergences import ForwardKL
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.seqkd import SeqKD
from understudy.models.forward import score_no_grad
from understudy.recipe import RecipeError, parse
from understudy.run.build import build
from understudy.step import Step
from understudy.teachers.student import StudentTeacher

PRIVILEGED = [replace(e, teacher_prompt=[9, 8, *e.prompt]) for e in ragged_examples()]
BATCH = Batch.from_examples(PRIVILEGED[:5], 0)


class Record(TrainerCallback):
    """The student's trainable weights, and the teacher's scores of one batch, before the first step and after each."""

    def __init__(self, teacher):
        self.teacher, self.weights, self.scores = teacher, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        self.scores.append(self.teacher.score(BATCH).log_probs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_train_begin(args, state, control, model)


def train(folder, teacher, model, method=None, **options):
    record = Record(teacher)
    method = method or KD(divergence=ForwardKL())
    run = trainer(folder, method, model, teacher, examples=PRIVILEGED, options={"callbacks": [record]}, **options)
    run.train()
    return record


def scores(kind, values=None):
    """Of the batch as the teacher reads it, by a student of these weights, or as it was at the start."""
    model = student(kind).eval()
    if values is not None:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)
    return score_no_grad(model, BATCH.as_read_by_teacher()).log_probs


@pytest.mark.parametrize("kind", ["gpt2", "llama+lora"])
def test_the_start_stays_as_it_was(tmp_path, kind):
    record = train(tmp_path, StudentTeacher(), student(kind))
    assert not same(record.weights[0], record.weights[-1])
    for each in record.scores:
        torch.testing.assert_close(each, scores(kind), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama+lora"])
def test_the_current_weights_are_the_students_after_every_step(tmp_path, kind):
    record = train(tmp_path, StudentTeacher(weights="current"), student(kind))
    for each, values in zip(record.scores, record.weights, strict=True):
        torch.testing.assert_close(each, scores(kind, values), atol=1e-5, rtol=0)
    assert not torch.allclose(record.scores[0], record.scores[-1])


@pytest.mark.parametrize("kind", ["llama", "llama+lora"])
def test_the_average_is_that_of_the_weights_after_every_step(tmp_path, kind):
    record = train(tmp_path, StudentTeacher(weights="average", decay=0.75), student(kind))
    average = record.weights[0]
    for values, each in zip(record.weights[1:], record.scores[1:], strict=True):
        average = {name: 0.75 * average[name] + 0.25 * values[name] for name in average}
        torch.testing.assert_close(each, scores(kind, average), atol=1e-5, rtol=0)


def test_the_base_is_the_student_without_its_adapters(tmp_path):
    model = student("llama+lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    record = train(tmp_path, StudentTeacher(weights="base"), model)
    with model.disable_adapter():
        expected = score_no_grad(model.eval(), BATCH.as_read_by_teacher()).log_probs
    for each in record.scores:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("of", "copied"), [("start", "lora"), ("average", "lora"), ("current", None), ("base", None)])
def test_only_trained_weights_are_copied(of, copied):
    model = student("llama+lora")
    teacher = StudentTeacher(weights=of)
    teacher.set_student(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    separate = [name for name, parameter in teacher.model.named_parameters() if parameter.data_ptr() not in own]
    assert bool(separate) == (copied is not None)
    assert all("lora" in name for name in separate)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("of", ["start", "average"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, of):
    def run(folder, steps, **options):
        teacher = StudentTeacher(weights=of, decay=0.5)
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, **options}
        return trainer(folder, GKD(on_policy=0.5), student(), teacher, examples=PRIVILEGED, **options)

    whole = run(tmp_path / "whole", 4)
    whole.train()
    run(tmp_path / "parts", 2).train()
    resumed = run(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_without_a_prompt_of_its_own_the_current_student_has_nothing_to_learn(tmp_path):
    examples = [replace(example, teacher_prompt=None) for example in PRIVILEGED]
    teacher, method = StudentTeacher(weights="current"), KD(divergence=ForwardKL())
    run = trainer(tmp_path, method, student(), teacher, examples=examples, optim="sgd")
    before = weights(run.model)
    run.train()
    for name, value in weights(run.model).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def test_the_teacher_generates_after_its_own_prompts(tmp_path):
    sampling = short_sampling(temperature=0)
    run = trainer(tmp_path, SeqKD(), student(), StudentTeacher(), examples=PRIVILEGED, sampling=sampling)
    by_teacher = run.writers.teacher(PRIVILEGED[:4], Step(0, 0))
    by_student = run.writers.student([replace(e, prompt=e.teacher_prompt) for e in PRIVILEGED[:4]], Step(0, 0))
    assert [e.response for e in by_teacher] == [e.response for e in by_student]
    assert {e.author for e in by_teacher} == {"teacher"}


MISTAKES = {
    "weights is 'first', and can be start, average, current, base": lambda: StudentTeacher(weights="first"),
    "decay is 1, and must be at least 0 and below 1": lambda: StudentTeacher(weights="average", decay=1),
    "weights: base is the student without its adapters, and it has none": lambda: StudentTeacher(
        weights="base"
    ).set_student(tiny("llama")),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_sentence(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


RECIPE = {
    "student": {"model": "playground:contexts-student"},
    "teacher": {"student": {"weights": "start"}},
    "method": {"gkd": {}},
    "rollout": {"generate": {"max_new_tokens": 8}},
    "data": {"dataset": "playground:arithmetic", "limit": 16, "teacher_prompt": "{completion}\n{prompt}"},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"},
    "evaluate": {"show": 0},
}


def test_a_recipe_reads_the_solution_with_the_students_start(tmp_path):
    recipe = parse(RECIPE)
    run = build(recipe, arguments(tmp_path, max_steps=2))
    example = run.train.examples[0]
    tokenizer, row = run.tokenizer, run.train.rows[0]
    assert tokenizer.decode(example.teacher_prompt) == f"{row.response}\n{row.prompt}"
    run.trainer.train()
    assert run.trainer.state.global_step == 2


def test_a_prompt_for_a_teacher_that_the_method_does_not_use_is_refused(tmp_path):
    recipe = parse({**RECIPE, "method": {"sft": {}}, "teacher": None})
    with pytest.raises(RecipeError, match=r"data.teacher_prompt is read by a teacher, and sft uses none"):
        build(recipe, arguments(tmp_path))
