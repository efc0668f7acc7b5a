"""What every teacher promises, whatever it is made of; one test body, run over all of them, the fakes included."""

import pytest
import torch
from fakes import VOCABULARY, BigramTeacher, ragged_examples, tiny

from understudy.batch import Batch
from understudy.divergences import ForwardKL
from understudy.method import Method
from understudy.teacher import Capability
from understudy.teachers.local import LocalTeacher

TEACHERS = {
    "bigram": lambda: BigramTeacher(),
    "local llama": lambda: LocalTeacher(tiny("llama")),
    "local gpt2": lambda: LocalTeacher(tiny("gpt2")),
    "local gemma2, soft-capped": lambda: LocalTeacher(tiny("gemma2")),
    "local with adapters": lambda: LocalTeacher(tiny("llama+lora")),
    "local with a padded vocabulary": lambda: LocalTeacher(tiny("llama", vocabulary=64)),
}


@pytest.fixture(params=TEACHERS, scope="module")
def teacher(request):
    return TEACHERS[request.param]()


@pytest.fixture(scope="module")
def examples():
    return ragged_examples(5, seed=3)


def log_probs(teacher, examples, pad=0):
    return teacher.score(Batch.from_examples(examples, pad)).log_probs


def test_scores_have_one_row_per_response_token_in_the_batch_s_order(teacher, examples):
    batch = Batch.from_examples(examples, 0)
    scores = teacher.score(batch)
    assert torch.equal(scores.tokens, batch.tokens)
    assert scores.log_probs.shape == (len(batch.tokens), VOCABULARY)
    for example, rows in zip(examples, scores.log_probs.split(batch.lengths.tolist()), strict=True):
        torch.testing.assert_close(rows, log_probs(teacher, [example]), atol=1e-5, rtol=0)


def test_every_row_is_a_distribution(teacher, examples):
    rows = log_probs(teacher, examples)
    assert rows.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(rows)), atol=1e-5, rtol=0)


def test_the_chosen_are_the_log_probabilities_of_the_tokens(teacher, examples):
    scores = teacher.score(Batch.from_examples(examples, 0))
    assert scores.chosen.shape == scores.tokens.shape
    torch.testing.assert_close(scores.chosen, scores.log_probs.gather(-1, scores.tokens[:, None])[:, 0])


def test_what_it_says_does_not_depend_on_padding(teacher, examples):
    torch.testing.assert_close(
        log_probs(teacher, examples, pad=0), log_probs(teacher, examples, pad=2), atol=1e-5, rtol=0
    )


def test_what_it_says_does_not_depend_on_later_tokens(teacher, examples):
    longest = max(examples, key=len)
    changed = type(longest)(longest.prompt, [*longest.response[:-2], 7, 8])
    before, after = log_probs(teacher, [longest]), log_probs(teacher, [changed])
    torch.testing.assert_close(before[:-1], after[:-1], atol=1e-5, rtol=0)


def test_it_says_the_same_twice(teacher, examples):
    assert torch.equal(log_probs(teacher, examples), log_probs(teacher, examples))


def test_no_gradient_comes_back(teacher, examples):
    scores = teacher.score(Batch.from_examples(examples, 0))
    assert not scores.log_probs.requires_grad
    assert not scores.chosen.requires_grad


def test_it_is_at_no_distance_from_itself(teacher, examples):
    scores = teacher.score(Batch.from_examples(examples, 0))
    assert scores.divergence_to(scores, ForwardKL()).abs().max() < 1e-5


def test_it_says_how_much_it_gives(teacher):
    assert Capability.CHOSEN <= teacher.gives <= Capability.MODEL
    assert (
        Method.needs.fget(None) is Capability.DISTRIBUTION
    )  # so everything above serves a method that declares nothing
