"""The contract of Teacher, tested for every teacher, including those of the tests.

What a teacher does not provide, `provides` says: tests of every token's log-probability are for those that have FULL.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
import torch
from caches import Caching
from fakes import VOCABULARY, BigramTeacher, ChosenTeacher, TopKOnlyTeacher, TopKTeacher, ragged_examples, tiny, words
from folders import characters, load_example
from servers import FakeVLLM, top_k_server, understudy_app
from torch import nn

from understudy.batch import Batch
from understudy.divergences import ForwardKL, JensenShannon
from understudy.fused_linear.distributions import Dense
from understudy.fused_linear.merged import Merged, TopK
from understudy.scores import Scores
from understudy.teacher import Capability
from understudy.teachers.cross_tokenizer import CrossTokenizerTeacher
from understudy.teachers.local import LocalTeacher
from understudy.teachers.mixture import MixtureTeacher
from understudy.teachers.routed import RoutedTeacher
from understudy.teachers.server import ServerTeacher
from understudy.teachers.student import StudentTeacher


def http_teacher(stack, served):
    """The teacher of examples/http_teacher.py, with a server that scores by another teacher."""
    return load_example("http_teacher").HTTPTeacher(stack.enter_context(top_k_server(served)), k=5)


def cross_tokenizer_teacher():
    """A teacher that reads letters, for a student whose 53 tokens are letters and pairs of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    student = characters([*letters, *(2 * letter for letter in letters[: VOCABULARY - 30])])
    teacher = CrossTokenizerTeacher(tiny("llama", vocabulary=len(characters())), tokenizer=characters())
    teacher.setup(student)
    return teacher


def cached(stack, teacher, **options):
    """A teacher whose scores are written to a folder and read from there."""
    return Caching(Path(stack.enter_context(TemporaryDirectory())), teacher, **options)


def served(model, **options):
    """A teacher behind `understudy serve`, or its fake vLLM, in this process."""
    local = LocalTeacher(model)
    if options.get("protocol") == "vllm":
        transport = httpx2.MockTransport(FakeVLLM(local, words(), VOCABULARY))
    else:
        transport = httpx2.ASGITransport(understudy_app(local, words()))
    teacher = ServerTeacher(["http://one", "http://two"], _transport=transport, **options)
    teacher.setup(words())
    return teacher


def of_student(model):
    """A teacher with the weights of a student."""
    teacher = StudentTeacher()
    teacher.set_student(model)
    return teacher


TEACHERS = {
    "bigram": lambda stack: BigramTeacher(),
    "local llama": lambda stack: LocalTeacher(tiny("llama")),
    "local gpt2": lambda stack: LocalTeacher(tiny("gpt2")),
    "local gemma2, soft-capped": lambda stack: LocalTeacher(tiny("gemma2")),
    "local with adapters": lambda stack: LocalTeacher(tiny("llama+lora")),
    "local with a padded vocabulary": lambda stack: LocalTeacher(tiny("llama", vocabulary=64)),
    "cached hidden rows": lambda stack: cached(stack, LocalTeacher(tiny("gemma2", vocabulary=64))),
    "cached top k": lambda stack: cached(stack, LocalTeacher(tiny("llama", vocabulary=64)), top_k=5),
    "cached top k in half precision": lambda stack: cached(stack, BigramTeacher(), top_k=5, dtype="float16"),
    "cached top k only": lambda stack: cached(stack, TopKOnlyTeacher(), top_k=3),
    "routed": lambda stack: RoutedTeacher(
        {"a": LocalTeacher(tiny("llama")), "b": BigramTeacher()}, weights={"a": 1.0, "b": 1.0}
    ),
    "mixture": lambda stack: MixtureTeacher({"a": LocalTeacher(tiny("llama")), "b": LocalTeacher(tiny("gpt2"))}),
    "student": lambda stack: of_student(tiny("llama")),
    "top k and chosen": lambda stack: TopKTeacher(),
    "top k only": lambda stack: TopKOnlyTeacher(),
    "chosen only": lambda stack: ChosenTeacher(),
    "server of a table": lambda stack: http_teacher(stack, BigramTeacher()),
    "another tokenizer": lambda stack: cross_tokenizer_teacher(),
    "server of a model": lambda stack: http_teacher(stack, LocalTeacher(tiny("llama"))),
    "understudy serve": lambda stack: served(tiny("gemma2", vocabulary=64)),
    "understudy serve, top k": lambda stack: served(tiny("llama", vocabulary=64), top_k=5),
    "vllm": lambda stack: served(tiny("llama", vocabulary=64), protocol="vllm", top_k=5),
}
WITH_CHOSEN = {Capability.CHOSEN, Capability.FULL}  # log-probabilities of all tokens include the chosen ones
WITH_DIVERGENCES = {Capability.TOP_K, Capability.FULL}


@pytest.fixture(params=TEACHERS, scope="module")
def teacher(request):
    with ExitStack() as stack:
        yield TEACHERS[request.param](stack)


@pytest.fixture(scope="module")
def examples():
    return ragged_examples(5, seed=3)


def scores_of(teacher, examples, pad=0):
    """Scores of the examples over the tokens that the tokenizer has, as a trainer uses them."""
    return teacher.score(Batch.from_examples(examples, pad)).cut(VOCABULARY)


def assert_same_scores(scores, expected, rows=slice(None), expected_rows=slice(None)):
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(scores.log_probs[rows], expected.log_probs[expected_rows], **close)
    if isinstance(expected.distribution, TopK):
        assert torch.equal(scores.distribution.support[rows], expected.distribution.support[expected_rows])
    reported = getattr(expected.distribution, "chosen_values", None)
    if not isinstance(expected.distribution, Merged) or reported is not None:
        torch.testing.assert_close(scores.chosen[rows], expected.chosen[expected_rows], **close)


def test_scores_have_a_row_per_response_token_in_the_order_of_the_batch(teacher, examples):
    batch = Batch.from_examples(examples, 0)
    scores = scores_of(teacher, examples)
    assert torch.equal(scores.tokens, batch.tokens)
    assert len(scores.log_probs) == len(batch.tokens)
    if Capability.FULL in teacher.provides:
        assert scores.log_probs.shape == (len(batch.tokens), VOCABULARY)
    ends = batch.lengths.cumsum(0).tolist()
    for example, start, end in zip(examples, [0, *ends], ends, strict=False):
        assert_same_scores(scores, scores_of(teacher, [example]), rows=slice(start, end))


def test_every_row_is_a_distribution(teacher, examples):
    log_probs = scores_of(teacher, examples).log_probs
    assert log_probs.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs)), atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_padding(teacher, examples):
    assert_same_scores(scores_of(teacher, examples, pad=2), scores_of(teacher, examples, pad=0))


def test_scores_do_not_depend_on_later_tokens(teacher, examples):
    longest = max(examples, key=len)
    before = scores_of(teacher, [longest])
    after = scores_of(teacher, [replace(longest, response=[*longest.response[:-2], 7, 8])])
    unchanged = slice(0, len(longest.response) - 2)
    assert_same_scores(after, before, rows=unchanged, expected_rows=unchanged)
    # the distribution of the changed token is the same as well, only the token itself is another
    torch.testing.assert_close(after.log_probs[:-1], before.log_probs[:-1], atol=1e-5, rtol=0)


def test_scores_are_the_same_twice(teacher, examples):
    first, second = scores_of(teacher, examples), scores_of(teacher, examples)
    assert torch.equal(first.log_probs, second.log_probs)


def test_scores_have_no_gradients(teacher, examples):
    scores = scores_of(teacher, examples)
    assert not scores.log_probs.requires_grad
    if teacher.provides & WITH_CHOSEN:
        assert not scores.chosen.requires_grad


def test_only_the_rows_of_trained_tokens_are_scored(teacher, examples):
    masked = [replace(e, trained=[place % 2 == 0 for place in range(len(e.response))]) for e in examples]
    trained = torch.tensor([place % 2 == 0 for e in examples for place in range(len(e.response))])
    assert_same_scores(scores_of(teacher, masked), scores_of(teacher, examples), expected_rows=trained)


def test_the_teachers_prompts_are_read_in_place_of_the_students(teacher, examples):
    prompts = [[9, 8, 7, 6, 5, 4, 3], None, [11], None, [4, 6]]
    examples = [replace(e, teacher_prompt=prompt) for e, prompt in zip(examples, prompts, strict=True)]
    scores = scores_of(teacher, examples)
    direct = [replace(e, prompt=e.teacher_prompt or e.prompt, teacher_prompt=None) for e in examples]
    assert torch.equal(scores.tokens, Batch.from_examples(examples, 0).tokens)
    assert_same_scores(scores, scores_of(teacher, direct))


def test_scores_of_prefetched_batches_are_the_same(teacher, examples):
    first, second = Batch.from_examples(examples[:2], 0), Batch.from_examples(examples[2:], 0)
    teacher.prefetch([first, second])
    for batch in (second, first):
        assert_same_scores(teacher.score(batch).cut(VOCABULARY), scores_of(teacher, batch.examples))


# What it provides


def student_scores(batch):
    logits = torch.randn(len(batch.tokens), VOCABULARY, generator=torch.Generator().manual_seed(0))
    return Scores(batch.tokens, Dense(logits.log_softmax(-1)))


def test_provides_is_a_set_of_capabilities(teacher):
    assert teacher.provides
    assert teacher.provides <= frozenset(Capability)


def test_chosen_log_probabilities_are_those_of_the_tokens_where_they_are_provided(teacher, examples):
    scores = scores_of(teacher, examples)
    if not teacher.provides & WITH_CHOSEN:
        with pytest.raises(ValueError, match="not the log-probability of the chosen token"):
            _ = scores.chosen
        return
    assert scores.chosen.shape == scores.tokens.shape
    assert (scores.chosen <= 0).all()
    if Capability.FULL in teacher.provides:
        torch.testing.assert_close(scores.chosen, scores.log_probs.gather(-1, scores.tokens[:, None])[:, 0])
    elif Capability.TOP_K in teacher.provides:
        among = scores.distribution.support == scores.tokens[:, None]
        in_support = among.any(-1)
        assert in_support.any()
        assert not in_support.all()
        torch.testing.assert_close(scores.chosen[in_support], scores.distribution.values[among])
        assert (scores.chosen[~in_support] <= scores.log_probs[~in_support, -1] + 1e-6).all()


def test_divergences_at_temperature_one_need_the_top_k(teacher, examples):
    if not teacher.provides & WITH_DIVERGENCES:
        pytest.skip("it provides no more than the chosen tokens")
    scores, student = scores_of(teacher, examples), student_scores(Batch.from_examples(examples, 0))
    values = scores.divergence_to(student, JensenShannon(0.5))
    assert values.shape == scores.tokens.shape
    assert (values > 0).all()


def test_softened_divergences_need_every_token(teacher, examples):
    scores, student = scores_of(teacher, examples), student_scores(Batch.from_examples(examples, 0))
    if Capability.FULL in teacher.provides:
        assert scores.log_probs.shape == (len(scores.tokens), VOCABULARY)
        assert (scores.divergence_to(student, ForwardKL(temperature=2.0)) > 0).all()
    else:
        with pytest.raises(ValueError, match="cannot be softened"):
            scores.divergence_to(student, ForwardKL(temperature=2.0))


def test_the_divergence_of_a_full_teacher_from_itself_is_zero(teacher, examples):
    if Capability.FULL not in teacher.provides:
        pytest.skip("it does not provide every token")
    scores = scores_of(teacher, examples)
    assert scores.divergence_to(scores, ForwardKL()).abs().max() < 1e-5


def test_a_live_model_can_be_differentiated(teacher, examples):
    if Capability.MODEL not in teacher.provides:
        assert teacher.model is None
        return
    assert isinstance(teacher.model, nn.Module)
    embeddings = teacher.model.get_input_embeddings()(torch.tensor([examples[0].prompt])).detach().requires_grad_()
    teacher.model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().max() > 0
