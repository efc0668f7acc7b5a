"""The decode loop beside transformers' own, beside a float64 reference, and where users break it.

What every rollout promises is tested in contracts/; this is about how `generate` samples, and for which models.
"""

import logging
import os
from dataclasses import replace

import fakes
import families
import pytest
import torch
from fakes import VOCABULARY, Forgetful, ragged_examples, tiny, words
from loop import arguments
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from understudy.batch import Example
from understudy.fused_linear.tiles import tiling
from understudy.generation import decoder, sampling
from understudy.generation.sampling import inverse_cdf, restrict
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.rollouts import generate
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step
from understudy.training.trainer import StudentTrainer

LAST = 1 - 2**-53  # the largest uniform number that can be drawn


def of(config, model, **fields):
    """A random model with two layers (alternating kinds of attention, where there are two) and large weights."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    instance = model(config(**shape, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields))
    with torch.no_grad():
        for name, parameter in instance.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return instance.eval()


MODELS = {
    "llama": lambda: tiny("llama"),
    "gpt2": lambda: tiny("gpt2"),
    "opt": lambda: tiny("opt"),
    "granite": lambda: tiny("granite"),
    "cohere": lambda: tiny("cohere"),
    "llama with adapters": lambda: tiny("llama+lora"),
    "qwen3": lambda: of(Qwen3Config, Qwen3ForCausalLM),
    "qwen3 with a sliding window": lambda: of(
        Qwen3Config, Qwen3ForCausalLM, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral with a sliding window": lambda: of(MistralConfig, MistralForCausalLM, sliding_window=4),
    "gemma2 with a sliding window": lambda: of(Gemma2Config, Gemma2ForCausalLM, sliding_window=4),
    "gemma3 with a sliding window": lambda: of(
        Gemma3TextConfig, Gemma3ForCausalLM, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
COMPILES = pytest.mark.skipif("TEST_COMPILED" not in os.environ, reason="takes minutes: set TEST_COMPILED=1")
PROMPTS = ragged_examples(7, seed=1, responses=False)


@pytest.fixture(scope="module")
def model_of():
    models = {}
    return lambda name: models.setdefault(name, MODELS[name]())


@pytest.fixture(params=["as it is", "over memory of a fixed size", "with column-major weights"])
def forward(request, monkeypatch):
    """How a token's forward is run.

    The second is what is compiled for long runs, here without the compiler; the third what several threads do.
    """
    monkeypatch.setattr(decoder._compiled, "_kernel", decoder._forward)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 if request.param == "with column-major weights" else 1)
    return {"compiled": request.param == "over memory of a fixed size"}


def writer(model, **options):
    return fakes.writer(GenerateRollout, model, **{"max_new_tokens": 12, **options})


def responses(examples):
    return [example.response for example in examples]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_responses_equal_those_of_transformers_generate(name, model_of, forward):
    """Token for token; several stop ids let rows finish early, so that the batch and its cache shrink on the way."""
    model = model_of(name)
    endless = writer(model, temperature=0, stop_ids=[2], **forward)(PROMPTS, Step(0))
    stop = [2, *(e.response[min(2 * i, len(e.response) - 1)] for i, e in enumerate(endless[::2]))]
    generated = writer(model, temperature=0, stop_ids=stop, **forward)(PROMPTS, Step(0))
    for example in generated:
        own = model.generate(
            input_ids=torch.tensor([example.prompt]),
            attention_mask=torch.ones(1, len(example.prompt), dtype=torch.long),
            generation_config=GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0),
        )
        assert example.response == own[0, len(example.prompt) :].tolist()
    if name != "opt":  # which writes one token for ever
        assert len({len(example.response) for example in generated}) > 1, (
            "the test must see rows finish at different times"
        )


def test_several_threads_write_with_column_major_weights_and_put_the_old_ones_back(monkeypatch):
    model, strides = tiny("llama", tied=True), []
    before = dict(model.named_parameters(remove_duplicate=False))
    for layer in (model.lm_head, model.model.layers[0].mlp.up_proj, model.model.embed_tokens):
        layer.register_forward_hook(lambda layer, *_: strides.append(layer.weight.stride(0)))

    def refuse(*_):
        raise KeyboardInterrupt

    for threads, stride in ((1, 16), (2, 1)):
        strides.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        writer(model)(PROMPTS, Step(0))
        assert strides[:3] == [16, stride, stride]  # the embedding, which is looked up by rows, is left as it is
        broken = writer(model)
        with monkeypatch.context() as patch:
            patch.setattr(generate, "draw", refuse)
            with pytest.raises(KeyboardInterrupt):
                broken(PROMPTS, Step(0))
        after = dict(model.named_parameters(remove_duplicate=False))
        assert all(after[name] is before[name] for name in before)
        assert list(after) == list(before)


def test_a_model_too_large_to_copy_is_left_as_it_is(monkeypatch):
    model, strides = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda layer, *_: strides.append(layer.weight.stride(0)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sampling, "_COLUMN_MAJOR_LIMIT", 1000)
    writer(model)(PROMPTS, Step(0))
    assert set(strides) == {16}


@pytest.mark.parametrize("name", MODELS)
def test_a_sampled_row_is_the_same_generated_alone(name, model_of, forward):
    generate = writer(model_of(name), stop_ids=[2, *range(5, 12)], n=2, **forward)
    together = generate(PROMPTS, Step(1))
    assert [example for prompt in PROMPTS for example in generate([prompt], Step(1))] == together


def test_sampled_tokens_are_those_of_a_float64_reference(model_of):
    """Every prefix scored again in float64, without a cache, and inverted with the same uniform numbers."""
    model = model_of("llama")
    exact = tiny("llama").double()
    for example in writer(model, temperature=0.8)(PROMPTS, Step(2, seed=4)):
        uniforms = Step(2, seed=4).stream(12, "student", example.row, 0)
        ids = list(example.prompt)
        for token, uniform in zip(example.response, uniforms, strict=False):
            probs = (exact(torch.tensor([ids])).logits[0, -1] / 0.8).softmax(-1)
            assert token == int((probs.cumsum(-1) <= uniform).sum())
            ids.append(token)


def test_sampled_tokens_follow_the_model_s_distribution(model_of):
    """Chi-square of 4000 first tokens; many streams, one prompt."""
    model, prompt, count = model_of("llama"), [4, 7], 4000
    generated = writer(model, max_new_tokens=1, batch_size=1000, n=count)([Example(prompt, [])], Step(0))
    probs = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    counts = torch.bincount(torch.tensor([example.response[0] for example in generated]), minlength=VOCABULARY)
    likely = probs * count >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([probs[likely], probs[~likely].sum()[None]]) * count
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 3.3 * (2 * degrees) ** 0.5 + 4


def test_the_inverse_of_a_distribution_is_exact():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7499, 0.75, LAST], dtype=torch.float64)
    assert inverse_cdf(probs.log().expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("uniform", [0.0, 2**-53, 0.5, LAST])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(500, 211, generator=generator)
    forbidden = torch.rand(500, 211, generator=generator) < 0.9
    forbidden[:, 100] = False
    tokens = inverse_cdf(logits.masked_fill(forbidden, -torch.inf), torch.full((500,), uniform, dtype=torch.float64))
    assert not forbidden.gather(-1, tokens[:, None]).any()
    assert not logits.masked_fill(forbidden, -torch.inf).softmax(-1).gather(-1, tokens[:, None]).eq(0).any()


def slow_restrict(row, top_k, top_p):
    """The ids that may be drawn, by the definitions, one token at a time in float64."""
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if 0 < top_k < len(row):
        ranked = [i for i in ranked if row[i] >= row[ranked[top_k - 1]]]
    weights = torch.tensor([row[i] for i in ranked], dtype=torch.float64).softmax(0).tolist()
    allowed, mass = set(), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if allowed and mass >= top_p - 1e-7:
            break
        allowed.add(token)
        mass += weight
    return allowed


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 11, 12, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.25, 0.01])
def test_exactly_the_top_k_then_the_top_p_can_be_drawn(top_k, top_p):
    generator = torch.Generator().manual_seed(1)
    logits = torch.cat(
        [
            3 * torch.randn(20, 12, generator=generator),
            torch.randint(0, 3, (40, 12), generator=generator).float(),  # ties everywhere
            torch.zeros(1, 12),
            torch.tensor([[0.5, 0.25, 0.125, 0.125] + [0.0] * 8]).log(),  # forbidden tokens, masses hit exactly
        ]
    )
    restricted = restrict(logits, top_k, top_p)
    for row, of in zip(restricted, logits, strict=True):
        allowed = slow_restrict(of.tolist(), top_k, top_p)
        assert {i for i in range(12) if row[i] > -torch.inf} == {i for i in allowed if of[i] > -torch.inf}
    same = restricted > -torch.inf
    assert torch.equal(restricted[same], logits[same])


def test_a_mass_that_is_reached_exactly_is_enough():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert (restrict(logits, top_p=0.5) > -torch.inf).tolist() == [[True, False, False]]
    assert (restrict(logits, top_p=0.75) > -torch.inf).tolist() == [[True, True, False]]


def test_restricted_sampling_draws_only_what_is_allowed(model_of):
    model = model_of("llama")
    generated = writer(model, max_new_tokens=1, n=300, top_k=6, top_p=0.8)(PROMPTS[:2], Step(0))
    for prompt in PROMPTS[:2]:
        logits = model(torch.tensor([prompt.prompt])).logits[0, -1]
        assert {e.response[0] for e in generated if e.row == prompt.row} <= slow_restrict(logits.tolist(), 6, 0.8)


def test_the_first_of_several_stop_tokens_ends_a_response_and_belongs_to_it(model_of):
    stop = [5, 9, 13, 17, 21, 25]
    generated = writer(model_of("gpt2"), stop_ids=stop)(PROMPTS, Step(0))
    for response in responses(generated):
        assert not set(response[:-1]) & set(stop)
    assert len({e.response[-1] for e in generated if not e.truncated}) > 1


def test_a_padding_token_that_equals_the_stop_token_does_no_harm(model_of):
    tokenizer = words()
    stop = [2, *range(5, 12)]
    before = writer(model_of("llama"), stop_ids=stop)(PROMPTS, Step(0))
    tokenizer.pad_token = tokenizer.eos_token
    after = GenerateRollout().bind(model_of("llama"), tokenizer)
    assert after.generate(PROMPTS, Sampling(max_new_tokens=12, stop_ids=tuple(stop)), Step(0)) == before


def test_a_prompt_with_padding_and_stop_tokens_is_read_completely(model_of):
    model, prompt = model_of("llama"), [0, 2, 0, 2]
    [example] = writer(model, temperature=0, max_new_tokens=1)([Example(prompt, [])], Step(0))
    assert example.response == [int(model(torch.tensor([prompt])).logits[0, -1].argmax())]


def test_a_response_without_room_to_end_is_truncated(model_of):
    [example] = writer(model_of("llama"), stop_ids=[52], max_new_tokens=3)(PROMPTS[:1], Step(0))
    assert example.truncated
    assert len(example.response) == 3


def test_a_model_s_own_generation_config_is_ignored(model_of):
    plain = writer(model_of("llama"))(PROMPTS, Step(0))
    opinionated = tiny("llama")
    opinionated.generation_config = GenerationConfig(
        do_sample=True, top_k=5, temperature=0.1, repetition_penalty=3.0, max_new_tokens=2, eos_token_id=2
    )
    assert writer(opinionated)(PROMPTS, Step(0)) == plain


def test_a_model_s_own_stop_tokens_count_beside_the_tokenizer_s():
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(5, 30))
    for example in writer(model)(PROMPTS, Step(0)):
        assert not set(example.response[:-1]) & {2, *range(5, 30)}


def test_a_padded_vocabulary_s_rest_is_never_sampled():
    model = tiny("llama", vocabulary=64)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 20 * model.lm_head.weight[:11]
    for temperature in (0.0, 1.0):
        for response in responses(writer(model, temperature=temperature, n=4)(PROMPTS, Step(0))):
            assert max(response) < VOCABULARY


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_number_of_rows_generated_at_once_changes_nothing(size, model_of):
    expected = writer(model_of("qwen3"), stop_ids=[2, *range(5, 12)], n=2)(PROMPTS, Step(0))
    parts = writer(model_of("qwen3"), stop_ids=[2, *range(5, 12)], n=2, batch_size=size)
    assert parts(PROMPTS, Step(0)) == expected


def test_a_repeated_prompt_gets_two_responses(model_of):
    prompts = [PROMPTS[2], PROMPTS[2]]
    one, two = writer(model_of("llama"))(prompts, Step(0))
    assert one.response != two.response
    assert [one, two] == writer(model_of("llama"), n=2)(prompts[:1], Step(0))


def test_responses_keep_the_pair_of_their_prompt(model_of):
    [example] = writer(model_of("llama"))([replace(PROMPTS[0], pair=7)], Step(0))
    assert example.pair == 7


def test_writing_happens_without_dropout_and_training_mode_comes_back():
    model = tiny("gpt2")
    before = writer(model)(PROMPTS, Step(0))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    assert writer(model)(PROMPTS, Step(0)) == before
    assert model.training
    assert all(module.training for module in model.modules())


def test_training_mode_comes_back_when_writing_fails():
    model = tiny("llama").train()
    with pytest.raises(IndexError):
        writer(model)([Example([99], [])], Step(0))
    assert model.training


def test_the_cache_is_used_under_gradient_checkpointing():
    """Without it, every token would run the whole prefix again: time would grow with the square of the length."""
    model = tiny("llama")
    plain = writer(model)(PROMPTS, Step(0))
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    widths = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    assert writer(model)(PROMPTS, Step(0)) == plain
    handle.remove()
    assert widths[0] > 1
    assert set(widths[1:]) == {1}


def test_no_gradient_is_kept():
    model = tiny("llama")
    writer(model)(PROMPTS, Step(0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_prompt_that_leaves_no_room_is_refused_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"a prompt of 60 tokens and 12 new ones .* window of 64: lower max_new_tokens"
    ):
        writer(tiny("llama"))([Example([4] * 60, [])], Step(0))


def test_a_prompt_may_fill_the_window_to_the_last_position():
    for kind in ("llama", "gpt2"):
        [example] = writer(tiny(kind), stop_ids=[52])([Example([4] * 52, [])], Step(0))
        assert len(example.response) == 12


def test_a_model_without_a_cache_reads_the_whole_sequence_for_every_token_and_says_so(caplog):
    options = {"stop_ids": [2, *range(5, 30)], "batch_size": 4}
    expected = writer(tiny("llama"), **options)(PROMPTS, Step(0))
    with caplog.at_level(logging.WARNING, "understudy.generation.cache_support"):
        forgetful = Forgetful()
        assert writer(forgetful, **options)(PROMPTS, Step(0)) == expected
        assert writer(forgetful, **options)(PROMPTS[:1], Step(0)) == expected[:1]
    assert caplog.text.count("Forgetful cannot generate with a key-value cache: it returns no ") == 1


@pytest.mark.parametrize("method", [KD(), GKD()])
@pytest.mark.parametrize("family", ["openai-gpt", "mamba", "falcon_h1"])
def test_models_without_a_cache_or_one_that_keeps_its_rows_are_trained(family, method, tmp_path):
    examples = ragged_examples(4, families.VOCABULARY)
    run = StudentTrainer(
        families.model(family),
        families.model(family, seed=1),
        method,
        GenerateRollout(),
        Sampling(max_new_tokens=4),
        processing_class=words(families.VOCABULARY),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=examples,
    )
    run.train()
    assert 0 < run.state.log_history[0]["loss"] < 100


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_distribution_that_is_not_a_number_is_refused_with_a_sentence(value, temperature):
    logits = torch.zeros(2, VOCABULARY)
    logits[1, slice(None) if value < 0 else 7] = value
    tokens = sampling.draw(logits, torch.tensor([0.5, 0.5]), Sampling(temperature=temperature, top_p=0.9))
    assert tokens[0] >= 0, "only the second row is undefined"
    with pytest.raises(FloatingPointError, match=r"is not a number, so no token can be drawn: .* use an earlier check"):
        sampling.check_tokens(int(tokens.min()))


def test_a_rollout_without_a_model_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"has no model yet: bind\(model, tokenizer\)"):
        GenerateRollout().generate(PROMPTS, Sampling(), Step(0))


def test_a_model_without_any_stop_token_is_refused_with_a_remedy():
    model, tokenizer = tiny("llama"), words()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="name the stop tokens with"):
        GenerateRollout().bind(model, tokenizer).generate(PROMPTS, Sampling(), Step(0))


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="generate needs batch_size >= 1, not 0"):
        GenerateRollout(batch_size=0)


def test_a_long_response_attends_to_growing_parts_of_its_memory(model_of, forward):
    """Beyond the first visible positions and the first allocation; rows are dropped on the way."""
    prompts = [replace(prompt, prompt=prompt.prompt[:4]) for prompt in PROMPTS]
    generate = writer(model_of("qwen3"), max_new_tokens=60, stop_ids=[2, 5], **forward)
    together = generate(prompts, Step(1))
    assert [example for prompt in prompts for example in generate([prompt], Step(1))] == together
    lengths = sorted(len(example.response) for example in together)
    assert lengths[0] < 20
    assert lengths[-1] > 50


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=COMPILES) for name in list(MODELS)[1:])])
def test_a_compiled_forward_writes_the_same(name, model_of):
    stop = [2, *range(5, 12)]
    expected = writer(model_of(name), max_new_tokens=40, stop_ids=stop)(PROMPTS[:5], Step(0))
    compiled = writer(model_of(name), max_new_tokens=40, stop_ids=stop, compiled=True)
    assert compiled(PROMPTS[:5], Step(0)) == expected


def test_a_model_that_cannot_be_compiled_writes_all_the_same(model_of, monkeypatch, caplog):
    def refuse(*_):
        raise torch._dynamo.exc.Unsupported("this cannot be compiled")

    monkeypatch.setattr(decoder._compiled, "_kernel", refuse)
    expected = writer(model_of("llama"))(PROMPTS, Step(0))
    with caplog.at_level(logging.WARNING, "understudy.generation.decoder"):
        assert writer(model_of("llama"), compiled=True)(PROMPTS, Step(0)) == expected
    assert caplog.text.count("this cannot be compiled") == 1


def test_decoding_is_compiled_if_the_run_is_unless_the_option_is_set(model_of, monkeypatch):
    calls = []
    monkeypatch.setattr(decoder._compiled, "_kernel", lambda *args: calls.append(1) or decoder._forward(*args))
    for option, run, expected in ((None, False, False), (None, True, True), (False, True, False), (True, False, True)):
        calls.clear()
        with tiling(compiled=run):
            writer(model_of("llama"), compiled=option)(PROMPTS, Step(0))
        assert bool(calls) == expected


def test_rows_that_cannot_be_dropped_do_not_change_responses(model_of, monkeypatch):
    stop = [2, *range(5, 30)]
    expected = writer(model_of("llama"), stop_ids=stop)(PROMPTS, Step(0))
    monkeypatch.setattr("understudy.generation.decoder.can_drop_rows", lambda cache: False)
    assert writer(model_of("llama"), stop_ids=stop)(PROMPTS, Step(0)) == expected


def test_tokens_of_a_large_vocabulary_are_those_of_a_float64_reference():
    """Several groups of tokens, one of them not full; flat and steep distributions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 50_257, generator=generator) * torch.logspace(-1, 1.3, 400)[:, None]
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    tokens = inverse_cdf(logits, uniforms)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, tokens[:, None])[:, 0]
    after = cumulative.gather(-1, tokens[:, None])[:, 0]
    assert (before - 1e-6 < uniforms).all()
    assert (uniforms < after + 1e-6).all()
    assert ((before <= uniforms) & (uniforms < after)).double().mean() > 0.99
