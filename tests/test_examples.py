"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from fakes import ragged_examples, tiny
from loop import logged, student, teacher, trainer

from understudy.batch import Batch
from understudy.methods.kd import KD
from understudy.step import Step
from understudy.teachers.local import LocalTeacher

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_learns():
    losses = example("plain_loop").main(steps=50)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_custom_method_moves_its_target_once_per_step_and_learns(tmp_path):
    method = example("custom_method").Interpolated(start=0.2)
    made = trainer(tmp_path, method, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    made.train()
    assert float(method.share) == 1.0
    assert logged(made, "forward_kl")[-1] < logged(made, "forward_kl")[0]


def test_the_custom_method_s_limits_are_no_loss_and_forward_kl():
    method, batch = example("custom_method").Interpolated(start=0.0), Batch.from_examples(ragged_examples(4), 0)
    q, p = LocalTeacher(student()).score(batch), teacher().score(batch)
    torch.testing.assert_close(method.loss(q, p, batch), torch.zeros(len(batch.tokens)), atol=1e-5, rtol=0)
    method.advance(Step(5, total=5))
    torch.testing.assert_close(method.loss(q, p, batch), KD().loss(q, p, batch), atol=1e-5, rtol=1e-4)


def test_the_custom_method_resumes_from_its_own_state():
    method = example("custom_method").Interpolated()
    method.advance(Step(3, total=7))
    other = example("custom_method").Interpolated()
    other.load_state_dict(method.state_dict())
    assert other.share == method.share != torch.tensor(0.4)


def test_the_custom_teacher_averages_probabilities_and_teaches(tmp_path):
    members = [LocalTeacher(tiny("llama", seed=seed)) for seed in (3, 4)]
    ensemble, batch = example("custom_teacher").Ensemble(members), Batch.from_examples(ragged_examples(4), 0)
    mean = sum(member.score(batch).log_probs.exp() for member in members) / 2
    torch.testing.assert_close(ensemble.score(batch).log_probs.exp(), mean, atol=1e-6, rtol=0)
    made = trainer(tmp_path, KD(), with_teacher=ensemble, max_steps=10)
    made.train()
    assert logged(made)[-1] < logged(made)[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_example_says_what_it_shows(name):
    assert len(example(name).__doc__) > 60
