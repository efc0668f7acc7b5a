"""The context window of one model or several."""

from fakes import tiny
from transformers import GPT2Config, LlamaConfig

from understudy.models.context_window import context_window


def test_the_context_window_is_that_of_the_shortest_model():
    short, long = LlamaConfig(max_position_embeddings=64), GPT2Config(n_positions=1024)
    assert context_window(short, long) == 64
    assert context_window(long) == 1024
    assert context_window() is None


def test_adapters_have_the_context_window_of_the_model_below_them():
    assert context_window(tiny("llama+lora").config) == 64
