"""Stop tokens of tokenizer, chat template and models."""

import pytest
from fakes import tiny, words

from understudy.generation.stop_tokens import stop_ids

CHATML = "{% for m in messages %}{{ m.role }} {{ m.content }} w9{% endfor %}{% if add_generation_prompt %}a {% endif %}"


def model_ending_with(ids):
    model = tiny("llama")
    model.generation_config.eos_token_id = ids
    return model


def test_stop_tokens_come_from_tokenizer_chat_template_and_models():
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    tokenizer.chat_template = CHATML
    models = [model_ending_with(11), model_ending_with([12, 2]), model_ending_with(None), None]
    assert stop_ids(words()) == [2]
    assert stop_ids(tokenizer) == [2, 9]
    assert stop_ids(tokenizer, *models) == [2, 9, 11, 12]


@pytest.mark.parametrize(("ids", "expected"), [([7], [7]), (None, [])])
def test_a_tokenizer_without_an_end_of_sequence_token_leaves_the_model_s(ids, expected):
    tokenizer = words()
    tokenizer.eos_token = None
    assert stop_ids(tokenizer, model_ending_with(ids)) == expected


def test_an_added_token_of_white_space_ends_no_response():
    tokenizer = words()
    tokenizer.add_tokens(["\n", " "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n {% endfor %}"
    assert stop_ids(tokenizer) == [2]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n w9{% endfor %}"
    assert stop_ids(tokenizer) == [2, 9]


def test_ids_beyond_the_vocabulary_are_left_out():
    assert stop_ids(words(), model_ending_with([5, 53, 60])) == [2, 5]
