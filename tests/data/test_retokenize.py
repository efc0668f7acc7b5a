"""Examples in the tokens of another tokenizer: bytes of tokens, shared boundaries, special tokens, chat templates."""

import logging
from dataclasses import replace

import pytest
from rows_of_text import CHATML, LLAMA2, byte_level, sentencepiece, wordpiece

from understudy.batch import Example
from understudy.data.errors import DataError
from understudy.data.examples import examples_from_rows
from understudy.data.retokenize import Retokenizer, token_starts
from understudy.data.token_bytes import TokenBytes
from understudy.data.tokenize import TextEncoder

TEXT = "the understudy learns parts. Naïve café 🎉 in 東京 京都 (two stars)\n\n  xyz"
TOKENIZERS = {"bpe": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


def ids_of(tokenizer, text, end=True):
    ids = TextEncoder(tokenizer).encode_responses([text])[0]
    return [*ids, tokenizer.eos_token_id] if end else ids


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_a_text_s_tokens_are_the_text(make):
    tokenizer = make()
    pieces = TokenBytes.of(tokenizer).pieces
    assert b"".join(pieces[i] for i in ids_of(tokenizer, TEXT, end=False)).decode() == TEXT
    assert pieces[tokenizer.eos_token_id].decode() == tokenizer.eos_token


def test_a_wordpiece_tokenizer_does_not_say_whether_a_space_is_before_punctuation():
    tokens = TokenBytes.of(tokenizer := wordpiece())
    names = ("the", "##s", "東", ".")
    the, s, tokyo, dot = tokenizer.convert_tokens_to_ids(names)
    assert [tokens.pieces[i] for i in (the, s, tokyo, dot)] == [b" the", b"s", "東".encode(), b"."]
    assert tokens.ambiguous & {the, s, tokyo, dot} == {dot}


def test_tokenizers_whose_tokens_are_no_parts_of_the_text_are_refused():
    with pytest.raises(DataError, match="makes capital letters small"):
        TokenBytes.of(wordpiece(lowercase=True))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TokenBytes.of(object())


@pytest.mark.parametrize("target", TOKENIZERS)
@pytest.mark.parametrize("source", ["bpe", "sentencepiece"])
def test_tokens_correspond_where_the_texts_before_them_are_the_same(source, target):
    """Found again by decoding every beginning of both; those that end inside a character decode to no text."""
    mine, theirs = TOKENIZERS[source](), TOKENIZERS[target]()
    text = TEXT if target != "wordpiece" else " the understudy learns two parts in café"
    response = ids_of(mine, text)
    [result] = Retokenizer(mine, theirs).retokenize([Example([5], response)])
    assert result.response == ids_of(theirs, text)

    def beginnings(tokenizer, ids):
        newline = ids_of(tokenizer, "\n", end=False)
        return [tokenizer.decode([*newline, *ids[:count]]).lstrip(" \n") for count in range(len(ids))]

    before = {text: index for index, text in enumerate(beginnings(theirs, result.response)) if "�" not in text}
    expected = [before.get(text) for text in beginnings(mine, response)]
    found = [
        index if "�" not in text else None
        for index, text in zip(result.indices, beginnings(mine, response), strict=True)
    ]
    assert found == expected
    assert len(response) / 3 < sum(index is not None for index in expected)
    if source == target:
        assert result.indices == list(range(len(response)))


def test_boundaries_inside_a_character_are_shared_where_bytes_are():
    """The emoji is four tokens in SentencePiece's bytes, and three or four in byte-level BPE."""
    mine, theirs = sentencepiece(), byte_level()
    response = ids_of(mine, "🎉", end=False)
    assert mine.convert_ids_to_tokens(response) == ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
    [result] = Retokenizer(mine, theirs).retokenize([Example([5], response)])
    pieces = [len(TokenBytes.of(theirs).pieces[i]) for i in result.response[:-1]]
    starts = [sum(pieces[:index]) for index in range(len(pieces))]
    assert result.indices == [starts.index(place) if place in starts else None for place in range(4)]


def test_nothing_corresponds_after_a_response_that_is_cut_inside_a_character():
    mine = sentencepiece()
    response = ids_of(mine, " a🎉", end=False)[:-1]
    [result] = Retokenizer(mine, byte_level()).retokenize([Example([5], response)])
    assert result.indices[-2:] == [None, None]
    assert None not in result.indices[:-2]


@pytest.mark.parametrize(("source", "target"), [("bpe", "sentencepiece"), ("sentencepiece", "wordpiece")])
def test_shared_tokens_stand_for_the_same_bytes_in_both_directions(source, target):
    mine, theirs = TOKENIZERS[source](), TOKENIZERS[target]()
    pairs = Retokenizer(mine, theirs).shared_tokens()
    bytes_of = [TokenBytes.of(tokenizer).pieces for tokenizer in (mine, theirs)]
    ends = (mine.eos_token_id, theirs.eos_token_id)
    assert ends in pairs
    assert all(bytes_of[0][i] == bytes_of[1][j] for i, j in pairs if (i, j) != ends)
    assert all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))
    shared = set(bytes_of[0].values()) & (set(bytes_of[1].values()) - {b".", b"?", b",", b":"})
    assert len(pairs) >= len(shared)
    assert sorted((j, i) for i, j in pairs) == Retokenizer(theirs, mine).shared_tokens()


def test_special_tokens_that_the_other_tokenizer_lacks_end_what_it_can_read():
    mine, theirs = byte_level(), sentencepiece()
    start, end, bos = mine.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<s>"])
    words = ids_of(mine, " the part", end=False)
    special = (start, bos, mine.eos_token_id)
    examples = [Example([5], [*words, token, *words, mine.eos_token_id]) for token in special]
    foreign, shared, ended = Retokenizer(mine, theirs).retokenize(examples)
    assert None not in foreign.indices[: len(words) + 1]
    assert set(foreign.indices[len(words) + 1 :]) == {None}
    assert None not in shared.indices, "both have <s>"
    assert set(ended.indices[len(words) + 1 :]) == {None}
    chat = Retokenizer(byte_level(chat=CHATML), byte_level(chat=CHATML, eos_token="<|end|>"))
    assert chat.ends == (end, end), "the tokens that end a response in both chat templates"
    assert Retokenizer(mine, byte_level(eos_token="<|end|>")).ends == (0, 4)


def test_prompts_are_rendered_by_the_other_tokenizer_s_chat_template(caplog):
    mine, theirs = byte_level(chat=CHATML), sentencepiece()
    theirs.chat_template = LLAMA2
    turns = ["Who plays?", "the star", "Who learns?", "the understudy"]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    [example] = examples_from_rows([{"messages": messages}], mine).examples
    retokenizer = Retokenizer(mine, theirs)

    def read(example, by=retokenizer):
        [result] = by.retokenize([example])
        return result

    rendered = "<s>[INST] Who plays? [/INST] the star </s><s>[INST] Who learns? [/INST]"
    assert read(example).prompt == theirs(rendered, add_special_tokens=False)["input_ids"]
    generated = replace(example, response=ids_of(mine, "nobody"), author="student")
    assert read(generated).prompt == read(example).prompt
    given = replace(example, teacher_prompt=ids_of(mine, "Who?", end=False))
    assert read(given).prompt == theirs("Who?")["input_ids"]
    plain = replace(example, prompt=ids_of(mine, "Who?", end=False), conversation=None)
    assert read(plain).prompt == theirs("Who?")["input_ids"]
    assert read(replace(plain, prompt=[mine.eos_token_id])).prompt == [theirs.bos_token_id]
    assert not caplog.records

    [several] = examples_from_rows([{"messages": messages}], mine, train_on="all").examples
    assert read(several.last_turn()).prompt == read(example).prompt
    with caplog.at_level(logging.WARNING):
        assert "Who plays?" in theirs.decode(read(several).prompt)
        assert "Who learns?" in byte_level().decode(read(example, Retokenizer(mine, byte_level())).prompt)
        system = [{"role": "system", "content": "Be kind."}, *messages]
        read(examples_from_rows([{"messages": system}], mine).examples[0])
    reasons = ("several turns to train on", "no chat template", "no system role")
    for reason, record in zip(reasons, caplog.records, strict=True):
        assert reason in record.getMessage()


def test_a_token_begins_nowhere_where_the_text_has_other_bytes():
    assert token_starts([b" a", b"b", b" c"], b" ab c") == {0: 0, 2: 1, 3: 2, 5: 3}
    assert token_starts([b" a", b" b"], b"a  b") == {4: 2}, "white space that the tokenizer does not write"
    assert token_starts([b" a", b" b", b" c"], b" a\n\nb c") == {0: 0, 5: 2, 7: 3}
    assert token_starts([b" a", None, b" b"], b" a? b") == {0: 0}
    assert token_starts([b" a", b"x", b" b"], b" a? b") == {0: 0}
    assert token_starts([], b"") == {0: 0}
