"""What a model's key-value cache can be used for is tried with a short batch."""

import logging

import families
import pytest
import torch
from fakes import Forgetful, tiny
from transformers import cache_utils
from transformers.modeling_outputs import CausalLMOutput

from understudy.generation.cache_support import CacheSupport, cache_support


def support(model):
    return cache_support(model, families.VOCABULARY - 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_with_an_ordinary_cache_has_all_uses(dtype):
    assert support(tiny("llama").to(dtype)) == CacheSupport()


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="the oldest transformers has other caches")
def test_it_is_tried_once_for_each_model(caplog):
    model, calls = families.model("falcon_h1"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.INFO, "understudy.generation.cache_support"):
        assert [support(model) for _ in range(2)] == [CacheSupport(drops_rows=False)] * 2
    assert len(calls) < 6
    assert caplog.text.count("stay in the batch") == 1
    assert "finished rows of FalconH1ForCausalLM stay in the batch while others are generated: Sizes" in caplog.text


def test_positions_that_are_counted_with_the_padding_are_noticed(caplog):
    """Bart counts positions from the start of the cache, padding included."""
    with caplog.at_level(logging.WARNING, "understudy.generation.cache_support"):
        assert not support(families.model("bart")).decodes
    assert "BartForCausalLM cannot generate with a key-value cache: its logits would be off by" in caplog.text


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_logits_that_say_nothing_are_left_to_the_cache(weight):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(weight)
    assert support(model) == CacheSupport()


class LooksAhead(Forgetful):
    """A model that reads all positions for each of them."""

    def forward(self, input_ids, attention_mask, **_):
        logits = super().forward(input_ids, attention_mask).logits
        return CausalLMOutput(logits=logits + logits.mean(1, keepdim=True))


def test_a_model_that_reads_later_tokens_is_refused_with_a_sentence():
    with pytest.raises(
        ValueError, match=r"LooksAhead cannot generate: its logits depend on later tokens or on padding"
    ):
        support(LooksAhead())


def test_a_window_too_short_to_try_is_left_to_the_cache():
    assert support(families.model("llama", max_position_embeddings=6)) == CacheSupport()
