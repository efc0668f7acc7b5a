"""Prompts and responses become ids with the right special tokens, and are cut to a length."""

import re

import pytest
from rows_of_text import LONG, PAIR, STORY, byte_level, texts

from understudy.data.examples import DataError, examples_from_rows, load_examples


def test_a_response_ends_with_one_end_of_sequence_token_even_when_it_is_the_padding_token(gpt2):
    assert gpt2.pad_token_id == gpt2.eos_token_id
    rows = [PAIR, {**PAIR, "completion": " four<|endoftext|>"}]
    first, second = examples_from_rows(rows, gpt2)
    assert first.response == second.response
    assert first.response.count(gpt2.eos_token_id) == 1
    assert first.response[-1] == gpt2.eos_token_id


def test_a_prompt_begins_with_one_bos_and_never_ends_with_an_eos():
    tokenizer = byte_level(bos=True, eos=True)
    for prompt in ("Who?", "<s>Who?"):
        [example] = examples_from_rows([{"prompt": prompt, "completion": "Me"}], tokenizer)
        assert texts(tokenizer, example) == ("<s>Who?", "Me<|endoftext|>")


def test_an_eos_behind_every_text_is_not_taken_for_a_bos():
    tokenizer = byte_level(eos=True)
    [example] = examples_from_rows([PAIR], tokenizer)
    assert texts(tokenizer, example) == ("Two plus two?", " four<|endoftext|>")


def test_no_space_comes_between_prompt_and_response_even_where_the_tokenizer_begins_texts_with_one(llama):
    for completion in ("four", " four", "\nfour"):
        [example] = examples_from_rows([{"prompt": "Answer:", "completion": completion}], llama)
        assert llama.decode(example.prompt + example.response) == f"<s> Answer:{completion}</s>"


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        examples_from_rows([PAIR], byte_level(eos_token=None))


def test_a_prompt_longer_than_the_limit_keeps_its_end(gpt2, caplog):
    uncut = examples_from_rows([LONG], gpt2)[0].prompt
    loaded = examples_from_rows([LONG, PAIR], gpt2, max_length=40, max_prompt_length=6)
    assert loaded[0].prompt == uncut[-6:]
    assert loaded.cut_prompts == 2 - (len(loaded[1].prompt) < 6)
    assert "prompts of rows are longer than 6 tokens and lost their beginning; raise max_prompt" in caplog.text


def test_a_cut_prompt_keeps_its_bos():
    tokenizer = byte_level(bos=True)
    uncut = examples_from_rows([LONG], tokenizer)[0].prompt
    [example] = examples_from_rows([LONG], tokenizer, max_prompt_length=6)
    assert example.prompt == [tokenizer.bos_token_id, *uncut[-5:]]


def test_a_prompt_leaves_the_reserved_tokens_free(gpt2, caplog):
    [example] = examples_from_rows([{"prompt": LONG["prompt"]}], gpt2, max_length=20, reserve=12)
    assert len(example.prompt) == 8
    assert "lost their beginning; raise max_length (20) or lower max_new_tokens (12)" in caplog.text


def test_a_response_that_does_not_fit_loses_its_end_and_its_stop_token(gpt2, caplog):
    uncut = examples_from_rows([LONG], gpt2)[0]
    [example] = loaded = examples_from_rows([LONG], gpt2, max_length=len(uncut) - 1)
    assert example.truncated
    assert example.response == uncut.response[:-1]
    assert gpt2.eos_token_id not in example.response
    assert loaded.cut_responses == 1
    assert "responses of rows reach beyond max_length" in caplog.text
    assert loaded.rows[0].references == (LONG["completion"],)
    [example] = loaded = examples_from_rows([LONG], gpt2, max_length=len(uncut))
    assert (example, loaded.cut_responses) == (uncut, 0)


@pytest.mark.parametrize(
    "lengths", [{"max_prompt_length": 64}, {"reserve": 64}, {"max_prompt_length": 40, "reserve": 30}]
)
def test_lengths_that_leave_no_room_are_refused(lengths, gpt2):
    with pytest.raises(DataError, match=r"max_length 64 has no room for a prompt.* tokens of response"):
        examples_from_rows([PAIR], gpt2, max_length=64, **lengths)


def test_long_prompts_can_be_skipped_or_refused(gpt2):
    loaded = examples_from_rows([LONG, {"prompt": "Who"}], gpt2, max_prompt_length=6, on_long_prompt="skip")
    assert [row.prompt for row in loaded.rows] == ["Who"]
    assert (loaded.skipped, loaded.cut_prompts) == (1, 0)
    with pytest.raises(DataError, match=r"rows, row 1: the prompt has \d+ tokens, and 6 fit"):
        examples_from_rows([LONG], gpt2, max_prompt_length=6, on_long_prompt="error")


def test_a_text_is_cut_into_chunks_that_begin_at_lines_without_losing_text(tmp_path, gpt2):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    loaded = load_examples(path, gpt2, max_length=60, text_prompt=5)
    assert all(len(example) <= 60 and len(example.prompt) == 5 for example in loaded)
    assert len(loaded) > 5
    chunks = ["".join(texts(gpt2, example)) for example in loaded]
    lines = {line for line in STORY.splitlines() if line}
    assert all(chunk.splitlines()[0] in lines for chunk in chunks)
    assert re.sub(r"\n+", "\n", "".join(chunks)) == re.sub(r"\n+", "\n", STORY.strip()) + "<|endoftext|>"
    assert [example.truncated for example in loaded] == [True] * (len(loaded) - 1) + [False]
    assert (loaded.rows[0].prompt, *loaded.rows[0].references) == texts(gpt2, loaded[0])


def test_a_line_longer_than_a_chunk_is_cut_inside(gpt2):
    line = "The star learns the part. " * 30
    loaded = examples_from_rows([{"text": line}], gpt2, max_length=40, text_prompt=2)
    assert "".join("".join(texts(gpt2, example)) for example in loaded) == line.strip() + "<|endoftext|>"


def test_documents_are_separated_and_end_each_with_an_eos(tmp_path, gpt2):
    path = tmp_path / "two.txt"
    path.write_text("The first part is long.\n<|endoftext|>\nThe second part\nis longer.\n")
    loaded = load_examples(path, gpt2, text_prompt=2)
    assert [row.where.rpartition(":")[2] for row in loaded.rows] == ["1", "3"]
    first, second = (texts(gpt2, example)[1] for example in loaded)
    assert first.endswith("is long.<|endoftext|>")
    assert second.endswith("is longer.<|endoftext|>")
    assert not any(example.truncated for example in loaded)


def test_every_chunk_begins_with_a_bos(llama):
    loaded = examples_from_rows([{"text": STORY}], llama, max_length=60, text_prompt=5)
    assert all(example.prompt[0] == llama.bos_token_id and len(example) <= 60 for example in loaded)


def test_a_text_too_short_for_a_response_is_skipped(gpt2):
    with pytest.raises(DataError, match=r"1 skipped, .* no longer than text_prompt \(32\);.* text_as: lines"):
        examples_from_rows([{"text": "The star"}], gpt2)
    with pytest.raises(DataError, match="text_prompt is 64, and a prompt can have 1 to 63 tokens"):
        examples_from_rows([{"text": STORY}], gpt2, max_length=64, text_prompt=64)
