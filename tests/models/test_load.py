"""Checks that tokenizers and models belong together."""

import pytest
from folders import VOCABULARY, characters
from transformers import LlamaConfig

from understudy.models.load import check_tokenizers, check_vocabulary
from understudy.recipe import RecipeError


def test_a_vocabulary_may_be_padded_but_not_too_small():
    tokenizer = characters()
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=VOCABULARY), "the student has")
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=VOCABULARY + 64), "the student has")
    with pytest.raises(RecipeError, match=f"has {VOCABULARY} tokens and the student has embeddings for 9 only"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=9), "the student has")


def test_tokenizers_that_differ_are_refused_and_different_ends_of_sequence_are_logged(caplog):
    check_tokenizers(characters(), characters())
    assert not caplog.records
    with pytest.raises(RecipeError, match=r"differ in 1 of \d+ and \d+ tokens \('!' is absent for the student and"):
        check_tokenizers(characters(), characters("0123456789+-*/=#\n .,?abcdefghijklmnopqrstuvwxyz!"))
    teacher = characters()
    teacher.eos_token = "<s>"
    check_tokenizers(characters(), teacher)
    assert "end their responses differently ('</s>' and '<s>')" in caplog.text


def test_tokenizers_with_the_same_tokens_that_split_text_differently_are_refused():
    from tokenizers import normalizers

    teacher = characters()
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RecipeError, match="the same tokens but split text differently"):
        check_tokenizers(characters(), teacher)
