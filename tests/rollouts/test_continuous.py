"""Continuous batching: the tokens of rollout generate, whatever transformers schedules; and unsupported models.

Tests of all rollouts are in contracts/.
"""

import gc
import threading
import warnings
from types import MethodType

import fakes
import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, words
from test_generate import MODELS
from transformers import (
    ContinuousBatchingConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState

from understudy.batch import Example
from understudy.rollouts.continuous import ContinuousRollout, is_available
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step

pytestmark = pytest.mark.skipif(not is_available(), reason="this transformers is too old for continuous batching")
PROMPTS = ragged_examples(5, seed=1, responses=False)
STOP = [2, *range(5, 9)]
SETTINGS = {"max_new_tokens": 12, "stop_ids": STOP, "batch_size": 3}


def writer(model, **options):
    return fakes.writer(ContinuousRollout, model, **{**SETTINGS, **options})


def as_generate_does(model, **options):
    return fakes.writer(GenerateRollout, model, **{**SETTINGS, **options})(PROMPTS, Step(3))


@pytest.fixture(autouse=True, scope="module")
def rubbish_is_looked_for_among_few():
    """transformers collects garbage several times a call, which takes longer than the tiny models do."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_runs_on():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("name", [name for name in MODELS if "gemma2" not in name])
def test_sampled_tokens_are_those_of_generate(name):
    """More rows than the cache has room for, so that rows join as others end; the same streams, another engine."""
    model = MODELS[name]()
    fields = {"n": 2, "temperature": 0.9, "top_p": 0.95}
    responses = writer(model, **fields)(PROMPTS, Step(3))
    assert responses == as_generate_does(model, **fields)
    if name != "opt":  # which writes one token for ever
        assert len({len(example.response) for example in responses}) > 1, "the test must see rows come and go"


def test_rows_that_are_evicted_from_a_full_cache_are_the_same(monkeypatch):
    """A cache of six pages of four tokens for three rows: transformers frees a row's pages and reads it again."""
    model, put_off = tiny("llama"), []
    expected = as_generate_does(model, stop_ids=[2])

    def small_cache(self, prompts, longest):
        return ContinuousBatchingConfig(
            page_size=4, num_blocks=6, max_batch_tokens=16, allow_block_sharing=False, safety_margin=0.0
        )

    def noticed(state, plain=RequestState.create_equivalent_initial_request):
        put_off.append(state.request_id)
        return plain(state)

    monkeypatch.setattr(ContinuousRollout, "_cache_config", small_cache)
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noticed)
    assert writer(model, stop_ids=[2])(PROMPTS, Step(3)) == expected
    assert put_off


def test_prompts_that_are_read_in_parts_are_the_same(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr("understudy.rollouts.continuous._PREFILL_TOKENS", 4)
    assert writer(model)(PROMPTS, Step(3)) == as_generate_does(model)


def test_one_row_at_a_time_fits_where_two_kinds_of_layers_share_the_cache():
    model = MODELS["gemma3 with a sliding window"]()
    assert writer(model, batch_size=1)(PROMPTS, Step(3)) == as_generate_does(model)


def test_a_padded_vocabulary_is_cut():
    model = tiny("llama", vocabulary=VOCABULARY + 11)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = model.lm_head.weight[:11] * 3
    responses = writer(model, n=4)(PROMPTS, Step(3))
    assert max(token for example in responses for token in example.response) < VOCABULARY
    assert responses == as_generate_does(model, n=4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_restored_after_generating(attention):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    writer(model)(PROMPTS, Step(0))
    assert torch.equal(torch.rand(3), expected)
    assert model.config._attn_implementation == attention
    assert model.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_generating():
    model = tiny("gpt2")
    model.config.attn_pdrop = 0.9
    expected = as_generate_does(model)
    assert writer(model.train())(PROMPTS, Step(3)) == expected


def test_adapters_are_used_while_generating():
    model = tiny("llama+lora")
    plain = writer(model)(PROMPTS, Step(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-9)
    assert writer(model)(PROMPTS, Step(0)) != plain


def test_accelerate_s_autocast_is_removed_while_generating_and_restored():
    model = tiny("llama")
    expected = writer(model)(PROMPTS, Step(0))
    half = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(LlamaForCausalLM.forward), model)
    model.forward = half
    assert writer(model)(PROMPTS, Step(0)) == expected
    assert model.forward is half


def test_nothing_is_printed_or_logged(capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer(tiny("llama"))(PROMPTS, Step(0))
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.text) == ("", "", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_stops_the_thread_and_leaves_the_model_as_it_was(error, monkeypatch):
    model = tiny("llama").train()
    model.set_attn_implementation("eager")
    generate = writer(model)

    def interrupted(self, **_):
        assert self.is_running()
        raise error

    generate(PROMPTS, Step(0))
    before = threading.active_count()
    monkeypatch.setattr(ContinuousBatchingManager, "get_result", interrupted)
    with pytest.raises(error):
        generate(PROMPTS, Step(0))
    monkeypatch.undo()
    assert threading.active_count() <= before
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert generate(PROMPTS, Step(0))


def test_what_fails_in_the_thread_is_raised_here(monkeypatch, capfd):
    model = tiny("llama")
    generate = writer(model)
    generate(PROMPTS, Step(0))
    before = model.model.forward

    def failing(*_, **__):
        raise RuntimeError("the card is on fire")

    model.model.forward = failing
    with pytest.raises(RuntimeError, match="the card is on fire"):
        generate(PROMPTS, Step(0))
    model.model.forward = before
    assert generate(PROMPTS, Step(0))
    assert capfd.readouterr().err == ""


def test_a_cache_that_does_not_fit_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(
        ContinuousRollout, "_cache_config", lambda *_: ContinuousBatchingConfig(num_blocks=10**9, max_batch_tokens=64)
    )
    with pytest.raises(ValueError, match=r"^the cache for 3 rows .*: lower rollout\.continuous\.batch_size or max_new"):
        writer(tiny("llama"))(PROMPTS, Step(0))


class Forgetful(LlamaForCausalLM):
    """A model whose logits differ with a paged cache."""

    def forward(self, *args, cache=None, **kwargs):
        paged = {} if cache is None else {"cache": cache}
        output = super().forward(*args, **paged, **kwargs)
        if paged:
            output.logits = output.logits.roll(1, -1)
        return output


class Failing(LlamaForCausalLM):
    def forward(self, *args, cache=None, **kwargs):
        raise TypeError("no cache, please")


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, eos_token_id=2))


def convolving():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = ["conv", "full_attention"]
    config = Lfm2Config(vocab_size=VOCABULARY, **shape, num_key_value_heads=1, layer_types=kinds, eos_token_id=2)
    return Lfm2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (mamba, "its attention cannot be exchanged for a paged one"),
        (convolving, "there is no paged cache for layers of conv"),
        (lambda: tiny("gemma2"), "paged attention leaves out its soft-cap"),
        (lambda: Forgetful(tiny("llama").config), "its logits would be off by .* of their standard deviation"),
        (lambda: Failing(tiny("llama").config), "it fails with “no cache, please”"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_a_remedy(make, why):
    with pytest.raises(
        ValueError, match=f"^continuous batching cannot generate with .*: ({why}); use rollout generate$"
    ):
        writer(make())(PROMPTS, Step(0))


def test_an_older_transformers_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr("understudy.rollouts.continuous.transformers_version", "5.22.9")
    with pytest.raises(ValueError, match=r"needs transformers 5\.23 or later, and this is 5\.22\.9; use"):
        writer(tiny("llama"))


def test_a_prompt_that_leaves_no_room_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"window of 64: lower max_new_tokens"):
        writer(tiny("llama"))([Example([4] * 60, [])], Step(0))


def test_a_prompt_may_fill_the_window_to_the_last_position():
    [response] = writer(tiny("gpt2"), stop_ids=[52])([Example([4] * 52, [])], Step(0))
    assert len(response.response) == 12


def test_a_rollout_without_a_model_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"has no model yet: bind\(model, tokenizer\)"):
        ContinuousRollout().generate(PROMPTS, Sampling(), Step(0))


def test_a_model_without_any_stop_token_is_refused_with_a_remedy():
    model, tokenizer = tiny("llama"), words()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"name the stop tokens with rollout\.continuous\.stop_ids"):
        ContinuousRollout().bind(model, tokenizer).generate(PROMPTS, Sampling(), Step(0))


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="continuous needs batch_size >= 1, not 0"):
        ContinuousRollout(batch_size=0)


def test_log_probs_are_those_of_generate_while_other_prompts_are_read(monkeypatch):
    """Prompts read in parts have rows of logits before they have a token: these may not be taken for anybody's."""
    model = tiny("llama")
    monkeypatch.setattr("understudy.rollouts.continuous._PREFILL_TOKENS", 4)
    expected = as_generate_does(model, logprobs=True, n=2)
    results = writer(model, logprobs=True, n=2)(PROMPTS, Step(3))
    for example, other in zip(results, expected, strict=True):
        assert example.response == other.response
        assert example.streams["sampled_logprob"] == pytest.approx(other.streams["sampled_logprob"], abs=1e-4)
