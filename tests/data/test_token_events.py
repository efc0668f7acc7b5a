"""Events of two vocabularies: first pieces found again by following encodings, and lower bounds by enumerated texts."""

import random
from functools import cache
from itertools import product

import pytest
import torch
from projected import f64
from rows_of_text import byte_level, sentencepiece, wordpiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from understudy.data.retokenize import Retokenizer
from understudy.data.token_bytes import TokenBytes
from understudy.data.token_events import events_of_tokens
from understudy.data.tokenize import TextEncoder
from understudy.divergences import ForwardKL, JensenShannon, ReverseKL, SkewKL, TotalVariation
from understudy.fused_linear.events import TokenEvents

DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(0.3), SkewKL(), TotalVariation()]
TOKENIZERS = {"bpe": byte_level(), "sentencepiece": sentencepiece(), "wordpiece": wordpiece()}


@cache
def events_between(source, target, kind):
    return events_of_tokens(Retokenizer(source, target), kind, (len(source), len(target)))


@pytest.mark.parametrize(
    "names",
    [("bpe", "sentencepiece"), ("sentencepiece", "bpe"), ("bpe", "wordpiece"), ("wordpiece", "bpe")],
    ids="-".join,
)
def test_a_token_that_the_other_vocabulary_lacks_belongs_to_the_first_piece_of_its_text(names):
    """Followed from encoding to encoding, for every token that is a text; CJK, emoji and white space are among them."""
    both = [TOKENIZERS[name] for name in names]
    events, pairs = events_between(*both, "first_piece"), Retokenizer(*both).shared_tokens()
    of, other = (events.source, events.target), events.count - 1
    tokens = [TokenBytes.of(tokenizer) for tokenizer in both]
    strings = {tokens[0].pieces[a]: k for k, (a, _) in enumerate(pairs)}
    followed = 0
    for side, encoder in enumerate(map(TextEncoder, reversed(both))):
        for token, piece in tokens[side].pieces.items():
            if token in tokens[side].special or token in tokens[side].ambiguous or piece in strings:
                continue
            try:
                first = encoder.encode_responses([piece.decode()])[0][0]
            except (UnicodeDecodeError, IndexError):
                continue  # a part of a character, and white space that WordPiece does not write
            start = tokens[1 - side].pieces.get(first, b"?")
            if piece.startswith(start) and len(start) < len(piece):
                assert of[side][token] == of[1 - side][first]
                followed += 1
    assert followed > 10
    for side in (0, 1):
        for token, event in enumerate(of[side]):
            if event != other and token not in [pair[side] for pair in pairs]:
                root = tokens[0].pieces[pairs[event][0]]
                assert tokens[side].pieces[token].startswith(root), "in the end a string that both have"
    assert [of[0][a] for a, _ in pairs] == [of[1][b] for _, b in pairs] == list(range(other))


def test_two_byte_level_vocabularies_leave_only_special_tokens_to_any_other():
    for source, target in (("bpe", "sentencepiece"), ("sentencepiece", "bpe")):
        for kind in ("first_piece", "first_byte"):
            events = events_between(TOKENIZERS[source], TOKENIZERS[target], kind)
            for of, name in ((events.source, source), (events.target, target)):
                special = TokenBytes.of(TOKENIZERS[name]).special
                assert {i for i, event in enumerate(of) if event == events.count - 1} <= special
    events, bpe = events_between(TOKENIZERS["bpe"], TOKENIZERS["sentencepiece"], "first_piece"), TOKENIZERS["bpe"]
    start = bpe.convert_tokens_to_ids("<|im_start|>")
    assert events.source[start] == events.count - 1, "a special token is not the text of its name"
    assert events.source[bpe.eos_token_id] == events.target[TOKENIZERS["sentencepiece"].eos_token_id]


@pytest.mark.parametrize("kind", ["shared", "first_piece"])
def test_equal_tokenizers_have_an_event_for_every_token(kind):
    for tokenizer in TOKENIZERS.values():
        events = events_between(tokenizer, tokenizer, kind)
        ordinary = TokenBytes.of(tokenizer)
        own = [i for i in ordinary.pieces if i not in ordinary.ambiguous]
        assert events.source == events.target
        assert len({events.source[i] for i in own}) == len(own)


# Lower bounds: next-token distributions of two models of all texts of up to four letters


def merging(*merges):
    """A byte-level BPE of a, b and what the merges make."""
    names = ["<e>", "a", "b", *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")


TEXTS = ["".join(letters) for length in range(5) for letters in product("ab", repeat=length)]
LETTERS, PAIRS = merging(), merging(("a", "b"), ("ab", "a"), ("b", "b"))
LATE = merging(("b", "b"), ("a", "b"))  # "abb" is a, bb


def first_token(tokenizer, text):
    return (tokenizer.encode(text) or [tokenizer.eos_token_id])[0]


def next_token(tokenizer, probabilities):
    """(1, V) log-probabilities of the first token, of a model that writes texts in the tokenizer's own tokens."""
    p = torch.zeros(len(tokenizer), dtype=f64)
    for text, probability in zip(TEXTS, probabilities, strict=True):
        p[first_token(tokenizer, text)] += probability
    return p.log()[None]


def any_segmentation(tokenizer, probabilities, rng):
    """The same of a model that writes each text in random tokens: some first token that the text begins with."""
    p = torch.zeros(len(tokenizer), dtype=f64)
    for text, probability in zip(TEXTS, probabilities, strict=True):
        firsts = [i for name, i in tokenizer.get_vocab().items() if text.startswith(name)] or [tokenizer.eos_token_id]
        shares = torch.tensor([rng.random() for _ in firsts], dtype=f64)
        p[firsts] += probability * shares / shares.sum()
    return p.log()[None]


def random_texts(rng):
    weights = torch.tensor([rng.random() ** 4 for _ in TEXTS], dtype=f64)
    return weights / weights.sum()


def over_events(teacher, student, kind, log_p, log_q, divergence):
    found = events_between(student, teacher, kind)
    events = TokenEvents(torch.tensor(found.target), torch.tensor(found.source), found.count)
    return divergence(events.of_teacher(log_p), events.of_student(log_q))[0]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_first_bytes_give_a_lower_bound_of_the_divergence_between_texts(divergence):
    """Whatever the tokenizers are, and in whatever tokens the models write."""
    rng = random.Random(0)
    for teacher, student in product((LETTERS, PAIRS, LATE), repeat=2):
        for _ in range(10):
            p, q = random_texts(rng), random_texts(rng)
            bound = divergence(p.log()[None], q.log()[None])[0] + 1e-9
            for of in (next_token, lambda *options: any_segmentation(*options, rng)):
                value = over_events(teacher, student, "first_byte", of(teacher, p), of(student, q), divergence)
                assert value <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_first_pieces_give_a_lower_bound_where_both_first_tokens_of_every_text_are_one_event(divergence):
    rng = random.Random(1)
    for teacher, student in ((LETTERS, PAIRS), (PAIRS, LETTERS), (LETTERS, LATE), (PAIRS, PAIRS)):
        events = events_between(student, teacher, "first_piece")
        firsts = [(first_token(student, text), first_token(teacher, text)) for text in TEXTS]
        assert all(events.source[a] == events.target[b] for a, b in firsts)
        for _ in range(10):
            p, q = random_texts(rng), random_texts(rng)
            arguments = next_token(teacher, p), next_token(student, q), divergence
            value = over_events(teacher, student, "first_piece", *arguments)
            assert over_events(teacher, student, "first_byte", *arguments) <= value + 1e-9
            assert value <= divergence(p.log()[None], q.log()[None])[0] + 1e-9


def test_first_pieces_and_shared_strings_are_no_lower_bound_in_general():
    """Two models of the same texts, whose divergence is 0, differ where the tokenizers split after another letter."""
    tv = TotalVariation()
    same = torch.tensor([float(text == "abb") for text in TEXTS], dtype=f64)
    for kind, teacher, student, expected in (
        ("first_piece", PAIRS, LATE, 1.0),  # "ab" and "a", which both vocabularies have
        ("first_byte", PAIRS, LATE, 0.0),
        ("shared", LETTERS, PAIRS, 1.0),  # "a", and "ab", which is any other token
        ("first_piece", LETTERS, PAIRS, 0.0),
    ):
        value = over_events(teacher, student, kind, next_token(teacher, same), next_token(student, same), tv)
        assert value.item() == pytest.approx(expected, abs=1e-9)
