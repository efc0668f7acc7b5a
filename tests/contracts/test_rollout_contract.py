"""The contract of Rollout, tested for every rollout, including the fakes."""

import gc
from dataclasses import replace

import httpx2
import pytest
import torch
from fake_engine import FakeVLLMEngine
from fakes import VOCABULARY, ScriptedRollout, ragged_examples, tiny, words, writer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

from understudy.batch import Example
from understudy.generation.response_cache import CachedRollout
from understudy.rollout import Writer
from understudy.rollouts.continuous import ContinuousRollout, is_available
from understudy.rollouts.generate import GenerateRollout
from understudy.rollouts.vllm import VLLMRollout
from understudy.step import Step

STOP, LONGEST = 2, 6
URL = "http://vllm:8000"


def scripted(model, author="student", **options):
    return writer(ScriptedRollout, model, author, **{"max_new_tokens": LONGEST, **options})


def generate(model, author="student", **options):
    return writer(GenerateRollout, model, author, **{"max_new_tokens": LONGEST, "batch_size": 3, **options})


def continuous(model, author="student", **options):
    if not is_available():
        pytest.skip("this transformers is too old for continuous batching")
    return writer(ContinuousRollout, model, author, **{"max_new_tokens": LONGEST, "batch_size": 3, **options})


def vllm(model, author="student", **options):
    """Of the fake server; the real one is tested in tests/rollouts/test_vllm_engine.py."""
    if author != "student":
        pytest.skip("vllm generates the student's responses only")
    transport = httpx2.MockTransport(FakeVLLMEngine())
    return writer(
        VLLMRollout, model, author, **{"max_new_tokens": LONGEST, "url": URL, "_transport": transport, **options}
    )


def cached(folder, model, **options):
    below = generate(model, "teacher", **options)
    return Writer(CachedRollout(below.rollout, folder / "responses.jsonl", "abc"), below.sampling)


RESTRICTED = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
MAKE = {
    "scripted": lambda folder, model, **options: scripted(model, **options),
    "generate": lambda folder, model, **options: generate(model, **options),
    "generate, greedy": lambda folder, model, **options: generate(model, temperature=0, **options),
    "generate, restricted": lambda folder, model, **options: generate(model, **RESTRICTED, **options),
    "continuous": lambda folder, model, **options: continuous(model, **options),
    "continuous, restricted": lambda folder, model, **options: continuous(model, **RESTRICTED, **options),
    "vllm": lambda folder, model, **options: vllm(model, **options),
    "vllm, restricted": lambda folder, model, **options: vllm(model, **RESTRICTED, **options),
    "cached": cached,
}
BOUND = {"scripted": scripted, "generate": generate, "continuous": continuous}
SERVED = {"vllm": vllm}
SAMPLED = {"generate": generate, "continuous": continuous}


def likely_to_stop():
    """Otherwise a random model would stop in one response of fifty only."""
    model = tiny("phi")
    with torch.no_grad():
        model.lm_head.bias[STOP] = 2.5
    return model


@pytest.fixture(autouse=True, scope="module")
def rubbish_is_looked_for_among_few():
    """Continuous batching collects garbage several times a call, which takes longer than the tiny models do."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=MAKE)
def rollout(request, tmp_path):
    return MAKE[request.param](tmp_path, likely_to_stop())


PROMPTS = ragged_examples(12, seed=5)


def test_there_is_a_response_to_every_prompt_in_their_order(rollout):
    responses = rollout(PROMPTS, Step(0))
    assert [(e.prompt, e.row) for e in responses] == [(e.prompt, e.row) for e in PROMPTS]


def test_nothing_in_a_response_comes_from_the_dataset_s(rollout):
    bare = [replace(e, response=[]) for e in PROMPTS]
    assert [e.response for e in rollout(PROMPTS, Step(0))] == [e.response for e in rollout(bare, Step(0))]


def test_a_response_ends_with_the_first_stop_token_or_is_truncated(rollout):
    responses = rollout(PROMPTS, Step(0))
    for example in responses:
        assert 1 <= len(example.response) <= LONGEST
        assert STOP not in example.response[:-1]
        assert example.truncated == (example.response[-1] != STOP)
        assert not example.truncated or len(example.response) == LONGEST
    assert {e.truncated for e in responses} == {True, False}, "the test must see both"


def test_responses_are_plain_integers(rollout):
    for example in rollout(PROMPTS[:2], Step(0)):
        assert type(example.response) is list
        assert {type(token) for token in example.response} == {int}


def test_the_same_step_gives_the_same_responses(rollout):
    assert rollout(PROMPTS, Step(3, 1)) == rollout(PROMPTS, Step(3, 1))


def test_responses_depend_only_on_the_row(rollout):
    together = rollout(PROMPTS, Step(3, 1))
    torch.rand(3)
    assert [rollout([prompt], Step(3, 1))[0] for prompt in PROMPTS] == together
    assert rollout(PROMPTS[::-1], Step(3, 1)) == together[::-1]


def test_no_prompts_give_no_responses(rollout):
    assert rollout([], Step(0)) == []


def test_prompts_are_not_changed(rollout):
    before = [replace(e, prompt=list(e.prompt), response=list(e.response)) for e in PROMPTS]
    rollout(PROMPTS, Step(0))
    assert before == PROMPTS


@pytest.mark.parametrize("name", [*BOUND, *SERVED, "cached"])
def test_several_responses_to_a_prompt_are_consecutive_and_different(name, tmp_path):
    several = MAKE[name](tmp_path, likely_to_stop(), n=3)
    responses = several(PROMPTS, Step(0))
    assert [e.row for e in responses] == [e.row for e in PROMPTS for _ in range(3)]
    assert [several([prompt], Step(0)) for prompt in PROMPTS] == [responses[i : i + 3] for i in range(0, 36, 3)]
    assert sum(len({tuple(e.response) for e in responses[i : i + 3]}) > 1 for i in range(0, 36, 3)) > 9


@pytest.mark.parametrize("name", BOUND)
def test_another_step_seed_or_author_draws_something_else(name):
    student, teacher = BOUND[name](likely_to_stop()), BOUND[name](likely_to_stop(), "teacher")
    draws = [student(PROMPTS, step) for step in (Step(0, 0), Step(1, 0), Step(0, 1))]
    draws.append(teacher(PROMPTS, Step(0, 0)))
    assert {e.author for e in draws[0]} == {"student"}
    assert {e.author for e in draws[-1]} == {"teacher"}
    assert len({str([e.response for e in responses]) for responses in draws}) == len(draws)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_rollout_stays_as_it_is_when_it_is_bound_or_gets_a_batch_size(name):
    student = SAMPLED[name](likely_to_stop())
    before = student(PROMPTS, Step(0))
    teacher = student.rollout.bind(tiny("llama"), words(), "teacher").with_batch_size(7)
    assert teacher.batch_size == 7
    assert {e.author for e in teacher.generate(PROMPTS, student.sampling, Step(0))} == {"teacher"}
    assert student.rollout.batch_size == 3
    assert student.rollout.with_batch_size(5).generate(PROMPTS, student.sampling, Step(0)) == before
    assert student(PROMPTS, Step(0)) == before


def test_without_logprobs_there_is_no_stream(rollout):
    assert all(not e.streams for e in rollout(PROMPTS, Step(0)))


@pytest.mark.parametrize("name", [name for name in MAKE if name != "scripted"])
def test_log_probabilities_are_the_model_s_own_at_temperature_one(name, tmp_path):
    """Whatever the temperature and the restriction to top-k and top-p; a padded vocabulary has no share in them.

    A server that others have started has the padded vocabulary, and is refused where that has a share.
    """
    model = tiny("phi", vocabulary=VOCABULARY + (0 if "vllm" in name else 11))
    with torch.no_grad():
        model.lm_head.bias[STOP] = 2.5
    plain = MAKE[name](tmp_path / "plain", model)
    results = MAKE[name](tmp_path / "logprobs", model, logprobs=True, n=2)(PROMPTS, Step(0))
    assert [e.response for e in results[::2]] == [e.response for e in plain(PROMPTS, Step(0))]
    for example in results:
        logits = model(torch.tensor([example.prompt + example.response])).logits[0, :, :VOCABULARY]
        log_probs = logits[len(example.prompt) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(example.response)[:, None])[:, 0].tolist()
        assert example.streams["sampled_logprob"] == pytest.approx(expected, abs=1e-4)


def test_mask_and_streams_of_the_dataset_s_response_are_dropped(rollout):
    examples = [replace(e, streams={"sampled_logprob": [0.0] * len(e.response)}) for e in PROMPTS]
    assert all(not e.streams for e in rollout(examples, Step(0)))


def gemma3():
    """Two layers, one with full attention and one with a sliding window of four tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    kinds = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, **shape, **heads, layer_types=kinds))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", [*SAMPLED, *SERVED])
def test_responses_are_generated_with_the_current_weights(name):
    model = tiny("llama")
    write = {**SAMPLED, **SERVED}[name](model)
    before = write(PROMPTS, Step(0))
    with torch.no_grad():
        model.lm_head.weight.neg_()
    write.rollout.sync(Step(1))
    assert write(PROMPTS, Step(0)) != before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("name", [*SAMPLED, *SERVED])
def test_greedy_responses_equal_those_of_transformers_generate(name, kind):
    model = gemma3() if kind == "gemma3" else tiny(kind)
    stop = [2, *range(5, 12)]
    greedy = {**SAMPLED, **SERVED}[name](model, max_new_tokens=12, temperature=0, stop_ids=stop, batch_size=4)
    own = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0)
    responses = greedy(PROMPTS, Step(0))
    for example in responses:
        ids = torch.tensor([example.prompt])
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=own)
        assert example.response == expected[0, len(example.prompt) :].tolist()
    assert len({len(example.response) for example in responses}) > 1, "the test must see rows finish at different times"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_follow_the_model_s_distribution(name, temperature):
    """Chi-square of 2000 first tokens: many streams, one prompt."""
    model, prompt, count = tiny("llama"), [4, 7], 2000
    fields = {"max_new_tokens": 1, "batch_size": 1000, "n": count, "temperature": temperature}
    responses = SAMPLED[name](model, **fields)([Example(prompt, [])], Step(0))
    probs = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).detach()
    counts = torch.bincount(torch.tensor([example.response[0] for example in responses]), minlength=VOCABULARY)
    likely = probs * count >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([probs[likely], probs[~likely].sum()[None]]) * count
    degrees = len(expected) - 1
    assert float(((observed - expected) ** 2 / expected).sum()) < degrees + 3.3 * (2 * degrees) ** 0.5 + 4


@pytest.mark.parametrize(("top_k", "top_p"), [(6, 1.0), (0, 0.6), (12, 0.7)])
@pytest.mark.parametrize("name", SAMPLED)
def test_exactly_the_tokens_of_top_k_and_top_p_are_drawn(name, top_k, top_p):
    """In 400 draws everything that is allowed comes out, if it is likely enough to, and nothing else."""
    model, prompt, count = tiny("llama"), [4, 7], 400
    fields = {"max_new_tokens": 1, "batch_size": 400, "n": count, "top_k": top_k, "top_p": top_p}
    responses = SAMPLED[name](model, **fields)([Example(prompt, [])], Step(0))
    ranked = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).sort(descending=True)
    probs, tokens = ranked.values[: top_k or None], ranked.indices[: top_k or None].tolist()
    probs = probs / probs.sum()
    size = int((probs.cumsum(-1) - probs < top_p).sum())
    surely = int((probs[:size] * count > 12).sum())  # missed with probability e⁻¹²
    sampled = {example.response[0] for example in responses}
    assert sampled <= set(tokens[:size])
    assert sampled >= set(tokens[:surely])
    assert surely > 1, "the test must see something"
    assert size < VOCABULARY
